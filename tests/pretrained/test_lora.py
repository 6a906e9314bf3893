"""LoRA on its way out: our network, the merged checkpoint, and the adapter that PEFT opens give the same logits."""

import dataclasses
import json

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, AxisType

from mmcore_jax import pretrained, sharding
from mmcore_jax.config import Lora, UserError
from mmcore_jax.nn.layers import is_lora
from mmcore_jax.pretrained import files
from mmcore_jax.pretrained import model as model_lib
from tests.pretrained.originals import IMAGE_TOKEN, ORIGINALS
from tests.pretrained.published import CONFIGS

TOLERANCE = 1e-4
SOME = Lora(rank=3, alpha=4.5, targets=("q", "gate"))
ALL = Lora(rank=2, alpha=8.0, targets=("q", "k", "v", "out", "gate", "up", "down"))


def arrays() -> dict[str, np.ndarray]:
    """An image of 2 x 2 merged patches between texts."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, IMAGE_TOKEN, (1, 24))
    ids[0, 8:12] = IMAGE_TOKEN
    patches = rng.normal(size=(16, 96)).astype(np.float32)
    return dict(
        input_ids=ids, attention_mask=np.ones_like(ids), pixel_values=patches, image_grid_thw=np.array([[1, 4, 4]])
    )


def theirs(model: torch.nn.Module) -> np.ndarray:
    given = {name: torch.from_numpy(x) for name, x in arrays().items()}
    given["mm_token_type_ids"] = (given["input_ids"] == IMAGE_TOKEN).long()
    with torch.no_grad():
        return model(**given).logits.numpy()


def original(directory) -> torch.nn.Module:
    return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture
def base(tmp_path):
    ORIGINALS["qwen_vl"]().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base, lora: Lora) -> pretrained.Pretrained:
    """The base with LoRA whose product is as large as the kernels."""
    loaded = pretrained.load(base)
    config = dataclasses.replace(loaded.config, lora=lora)
    shapes = flatten_dict(pretrained.abstract_params(loaded.family, config), sep="/")
    params, rng = flatten_dict(loaded.params, sep="/"), np.random.default_rng(1)
    params |= {path: rng.normal(0, 0.3, x.shape).astype(np.float32) for path, x in shapes.items() if is_lora(path)}
    return dataclasses.replace(loaded, config=config, params=unflatten_dict(params, sep="/"))


@pytest.mark.parametrize("lora", [SOME, ALL])
def test_merged_and_adapter_are_the_same_network(base, tmp_path, lora, record_property):
    ours = adapted(base, lora)
    expected = np.asarray(ours(**arrays()))
    assert np.abs(expected - np.asarray(pretrained.load(base)(**arrays()))).max() > 0.1, "LoRA changes something"

    tokens = {"image_token_id": IMAGE_TOKEN, "video_token_id": IMAGE_TOKEN + 1}
    pretrained.export(ours.params, ours.config, tmp_path / "merged", settings=tokens)
    pretrained.export_adapter(ours.params, ours.config, tmp_path / "adapter", base)
    model = peft.PeftModel.from_pretrained(original(base), tmp_path / "adapter").eval()
    found = {
        "merged": theirs(original(tmp_path / "merged")),
        "adapter": theirs(model),
        "merged, ours": np.asarray(pretrained.load(tmp_path / "merged")(**arrays())),
    }
    differences = {name: float(np.abs(logits - expected).max()) for name, logits in found.items()}
    record_property("max_difference", differences)
    assert max(differences.values()) < TOLERANCE, differences

    stored = set(files.read_header(tmp_path / "adapter/adapter_model.safetensors"))
    assert stored == set(peft.get_peft_model_state_dict(model)), "PEFT put LoRA on other layers"
    assert len(stored) == 2 * len(lora.targets) * ours.config.depth


def test_peft_finds_the_base_by_itself(base, tmp_path):
    ours = adapted(base, SOME)
    pretrained.export_adapter(ours.params, ours.config, tmp_path / "adapter", base)
    settings = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (settings.peft_type, settings.r, settings.lora_alpha) == ("LORA", SOME.rank, SOME.alpha)
    assert settings.base_model_name_or_path == str(base)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_half_precision_is_merged_in_float32(base, tmp_path, dtype):
    """The sum is rounded once, from float32."""
    ours = adapted(base, SOME)
    params = jax.tree.map(lambda x: np.asarray(x, dtype), ours.params) if dtype else ours.params
    pretrained.export(params, ours.config, tmp_path / "merged")
    block = params["decoder"]["blocks"]["q"]
    kernel, a, b = (np.asarray(block[name], np.float32) for name in ("kernel", "lora_a", "lora_b"))
    expected = (kernel + np.float32(1.5) * (a @ b)).astype(dtype or np.float32)
    found = pretrained.load(tmp_path / "merged").params
    np.testing.assert_array_equal(found["decoder"]["blocks"]["q"]["kernel"], expected)
    np.testing.assert_array_equal(found["embedding"], params["embedding"])


def test_without_lora_there_is_no_adapter(base, tmp_path):
    loaded = pretrained.load(base)
    with pytest.raises(UserError, match="no LoRA"):
        pretrained.export_adapter(loaded.params, loaded.config, tmp_path / "adapter", base)
    assert not (tmp_path / "adapter").exists()


def test_failure_leaves_nothing(base, tmp_path, monkeypatch):
    ours, before = adapted(base, SOME), sorted(tmp_path.rglob("*"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        pretrained.export_adapter(ours.params, ours.config, tmp_path / "adapter", base)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("sizes", [(1, 16, 1, 1), (2, 4, 1, 2)])
def test_full_size_matrices_are_sharded(tmp_path, sizes):
    """On every mesh with an fsdp or tensor axis, the long side of each of them: a large one that is not is an error."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Qwen2.5-VL-7B"]))
    published = model_lib.open_published(tmp_path)
    config = dataclasses.replace(published.config, lora=dataclasses.replace(ALL, rank=64))
    mesh = AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    shapes = flatten_dict(pretrained.abstract_params(published.family, config, mesh=mesh), sep="/")
    matrices = [x for path, x in shapes.items() if is_lora(path)]
    assert len(matrices) == 14
    for x in matrices:
        assert np.prod(x.shape) == np.prod(sizes[1:]) * np.prod(x.sharding.shard_shape(x.shape)), x
