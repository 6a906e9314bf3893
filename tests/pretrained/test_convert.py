"""The door, and `config.init` with a published checkpoint."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mmcore_jax import convert, pretrained, sharding
from mmcore_jax.config import UserError
from mmcore_jax.data import packing
from mmcore_jax.mmcore import MMCORE
from mmcore_jax.pretrained import table
from mmcore_jax.training.checkpoint import fingerprints
from mmcore_jax.training.state import freeze, make_plan
from mmcore_jax.training.weights import initial_params
from tests import tiny
from tests.pretrained.originals import ORIGINALS


@pytest.fixture
def enter(monkeypatch, capsys):
    """Runs the door and returns (exit code, stdout, stderr)."""

    def enter(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            convert.main()
        return stopped.value.code, *capsys.readouterr()

    return enter


@pytest.mark.parametrize(("name", "family"), [("sd3.5 dual", "SD3"), ("autoencoder quant", "AutoencoderKL")])
def test_there_and_back(enter, tmp_path, name, family):
    """Published, ours, published: the same tensors; verified on both ways."""
    ORIGINALS[name]().save_pretrained(tmp_path / "original")
    code, out, err = enter("--from", tmp_path / "original", "--to", tmp_path / "ours", "--verify")
    assert code == 0, err
    assert f"{family}, " in out
    assert "sample: largest difference" in out
    assert enter("--from", tmp_path / "ours", "--to", tmp_path / "back", "--verify")[0] == 0
    first, second = (pretrained.load(tmp_path / name) for name in ("original", "back"))
    assert first.config == second.config
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_mistakes_leave_nothing(enter, tmp_path, monkeypatch):
    ORIGINALS["siglip"]().save_pretrained(tmp_path / "original")
    monkeypatch.setattr(table, "_copy", lambda *_: (_ for _ in ()).throw(UserError("half way.")))
    assert enter("--from", tmp_path / "original", "--to", tmp_path / "ours")[0] == 2
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)
    code, _, err = enter("--from", tmp_path / "original", "--to", tmp_path / "ours", "--verify")
    assert code == 2
    assert "needs torch" in err
    code, _, err = enter("--from", tmp_path / "original", "--to", tmp_path / "original")
    assert code == 2
    assert "there already" in err
    code, _, err = enter("--from", tmp_path / "missing", "--to", tmp_path / "ours")
    assert code == 2
    assert "missing" in err
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def stage1(data, vision_target) -> tuple:
    config = tiny.config("stage1", data)
    config = dataclasses.replace(config, init=config.init | {"vision_target": str(vision_target)})
    model, mesh = MMCORE(config.model, config.execution), sharding.make_mesh(config.mesh)
    batch = packing.placeholder(config)
    return config, model, make_plan(config, model, mesh, batch), batch


def make_tower(directory, **changes) -> None:
    """A SigLIP whose vision tower is that of the tiny stage 1."""
    import transformers

    tower = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    text = transformers.SiglipTextConfig(**tower, vocab_size=50, bos_token_id=0, eos_token_id=1)
    vision = dict(tower, image_size=16, patch_size=4) | changes
    config = transformers.SiglipConfig(text_config=text.to_dict(), vision_config=vision)
    transformers.SiglipModel(config).save_pretrained(directory)


def test_init_from_a_published_checkpoint(enter, tmp_path):
    make_tower(tmp_path / "siglip")
    config, model, plan, batch = stage1(tmp_path, tmp_path / "siglip")
    patch = config.model.vision_target.vision.patch_size
    make_tower(tmp_path / "fitting", patch_size=patch)
    config, model, plan, batch = stage1(tmp_path, tmp_path / "fitting")
    frozen = freeze(config, plan, initial_params(config, model, plan, batch, plan.frozen))
    expected = pretrained.load(tmp_path / "fitting").params["vision"]
    for path, value in flatten_dict({"vision_target": {"vision": expected}}, sep="/").items():
        np.testing.assert_array_equal(frozen[path], value)

    assert enter("--from", tmp_path / "fitting", "--to", tmp_path / "ours")[0] == 0
    again, model, plan, batch = stage1(tmp_path, tmp_path / "ours")
    converted = freeze(again, plan, initial_params(again, model, plan, batch, plan.frozen))
    assert fingerprints(converted) == fingerprints(frozen)


@pytest.mark.parametrize(
    ("original", "words"),
    [
        ("siglip", ["config.model.vision_target.vision.depth is 2 and must be 3", "config.init.vision_target"]),
        ("sd3", ["SD3", "vision_target"]),
        (None, ["config.json", "model*.safetensors", "SigLIP", "put them there", "config.init.vision_target"]),
    ],
)
def test_init_from_the_wrong_place(tmp_path, original, words):
    if original:
        ORIGINALS[original]().save_pretrained(tmp_path / "original")
    config, model, plan, batch = stage1(tmp_path, tmp_path / "original")
    with pytest.raises(UserError) as raised:
        initial_params(config, model, plan, batch, plan.frozen)
    for word in words:
        assert word in str(raised.value), raised.value


def test_part_of_a_run(enter, tmp_path):
    """A part that SD3 cannot express, and one that is not there."""
    code, _, err = enter("--from", tmp_path, "--to", tmp_path / "out", "--part", "dit")
    assert code == 2
    assert "config.json does not exist" in err
    config = tiny.config("stage2", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    code, _, err = enter("--from", tmp_path, "--to", tmp_path / "out", "--part", "vision_target")
    assert code == 2
    assert "choose --part from vlm" in err
