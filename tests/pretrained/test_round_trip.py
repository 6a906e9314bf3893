"""Saved by the original, loaded by us, exported, opened by the original again: the same bits; and the same outputs."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mmcore_jax import pretrained
from mmcore_jax.pretrained import model as model_lib
from tests.pretrained.originals import ORIGINALS

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories that the original's `save_pretrained` has written, by name and shard size."""

    @functools.cache
    def save(name: str, shard_size: str = "5GB", dtype: torch.dtype = torch.float32):
        directory = tmp_path_factory.mktemp("original")
        ORIGINALS[name]().to(dtype).save_pretrained(directory, max_shard_size=shard_size)
        return directory

    return save


def assert_same_bits(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    found, expected = found.state_dict(), expected.state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
@pytest.mark.parametrize("name", ORIGINALS)
def test_every_tensor_comes_back(saved, tmp_path, name, shard_size):
    directory = saved(name, shard_size)
    assert (len(list(directory.glob("*.safetensors"))) > 1) == (shard_size == "40KB")
    loaded = pretrained.load(directory)
    shard_bytes = 40_000 if shard_size == "40KB" else 5 * 10**9
    pretrained.export(loaded.params, loaded.config, tmp_path / "out", shard_bytes=shard_bytes)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 or shard_size == "5GB"
    original = type(ORIGINALS[name]())
    assert_same_bits(original.from_pretrained(tmp_path / "out"), original.from_pretrained(directory))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen_vl tied", "siglip", "sd3"])
def test_half_precision_comes_back(saved, tmp_path, name, dtype):
    directory = saved(name, dtype=dtype)
    loaded = pretrained.load(directory)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.params)} == {str(dtype).removeprefix("torch.")}
    pretrained.export(loaded.params, loaded.config, tmp_path / "out")
    original, options = type(ORIGINALS[name]()), {"torch_dtype" if name == "sd3" else "dtype": dtype}
    expected = original.from_pretrained(directory, **options)
    assert_same_bits(original.from_pretrained(tmp_path / "out", **options), expected)


@pytest.mark.parametrize("name", ORIGINALS)
def test_outputs(saved, name, record_property):
    directory = saved(name, "40KB")
    loaded, found = pretrained.load(directory), {}
    for label, ours, theirs in loaded.family.comparisons(loaded, directory):
        assert ours.shape == theirs.shape
        assert np.abs(theirs).mean() > 0.05
        found[label] = float(np.abs(np.asarray(ours) - theirs).max())
    record_property("max_difference", found)
    assert max(found.values()) < TOLERANCE


def test_positions_are_numbered_as_the_stored_table_has_them(saved):
    """config.json does not tell; another network than the stored one is refused where it begins from it."""
    found = {name: pretrained.load(saved(name)).config for name in ("sd3", "sd3.5 dual")}
    assert [config.position_origin for config in found.values()] == ["corner", "centre"]
    published = pretrained.settled(pretrained.open_part(saved("sd3.5 dual"), "dit"))
    ours = dataclasses.replace(found["sd3.5 dual"], position_origin="corner")
    assert pretrained.differences(ours, published.config, "dit") == [("dit.position_origin", "corner", "centre")]


def test_dtype_is_cast_on_the_way(saved):
    whole, half = (pretrained.load(saved("siglip"), dtype=dtype).params for dtype in (None, "bfloat16"))
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole)
    for found, value in zip(jax.tree.leaves(half), jax.tree.leaves(expected), strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("published", [True, False])
def test_both_layouts_of_qwen(tmp_path, published):
    """Names of published files, and those of the modules of transformers 5."""
    from safetensors.torch import save_file

    original = ORIGINALS["qwen_vl"]()
    original.save_pretrained(tmp_path)
    state = original.state_dict()
    if published:
        names = {
            name: name.replace("model.language_model.", "model.").replace("model.visual", "visual") for name in state
        }
        state = {names[name]: value for name, value in state.items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    params = pretrained.load(tmp_path).params
    embedding = original.model.language_model.embed_tokens.weight.detach().numpy()
    np.testing.assert_array_equal(params["embedding"], embedding)


def test_vision_tower_of_a_whole_siglip(saved):
    """A config without a text tower leaves the other half unread."""
    published = model_lib.open_published(saved("siglip"))
    config = dataclasses.replace(published.config, text=None)
    assert model_lib.differences(config, published.config, "vision_target") == []
    params = model_lib.read(published, config, model_lib.abstract_params(published.family, config))
    whole = pretrained.load(saved("siglip")).params["vision"]
    jax.tree.map(np.testing.assert_array_equal, params, {"vision": whole})


def test_component_of_a_pipeline(saved, tmp_path):
    (tmp_path / "transformer").symlink_to(saved("sd3"))
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", "CLIPTokenizer"]}))
    assert pretrained.load(tmp_path, component="transformer").family.name == "SD3"
    for component in (None, "tokenizer"):
        with pytest.raises(ValueError, match="choose from transformer"):
            pretrained.load(tmp_path, component=component)
