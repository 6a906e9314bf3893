"""Bad checkpoints: one sentence that names the file, the tensor, and what to do; and nothing left behind."""

import json
import struct

import pytest

from mmcore_jax import pretrained
from mmcore_jax.config import UserError
from mmcore_jax.pretrained import files
from tests.pretrained.originals import ORIGINALS

NORM = "post_layernorm.weight"


@pytest.fixture
def directory(tmp_path):
    """A vision tower in one file."""
    ORIGINALS["siglip vision"]().save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


@pytest.fixture
def sharded(tmp_path):
    """A vision tower in shards."""
    ORIGINALS["siglip vision"]().save_pretrained(tmp_path / "tower", max_shard_size="40KB")
    return tmp_path / "tower"


def check(directory, *words: str) -> None:
    with pytest.raises(UserError) as raised:
        pretrained.load(directory)
    message = str(raised.value)
    assert message.endswith(".")
    assert "\n" not in message
    for word in words:
        assert word in message, message


def change_header(file, change) -> None:
    """Rewrites the header of a safetensors file; the bytes of its tensors stay."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def change_json(file, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_cut_short(directory, keep):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    check(directory, str(file), "cut short", "fetch the file again")


@pytest.mark.parametrize("damage", [b"{" + b"\0" * 40, b'{"a": 3}', b"[]"])
def test_damaged_header(directory, damage):
    file = directory / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(damage)) + damage)
    check(directory, str(file), "header that is damaged")


def test_no_tensor_at_all(directory):
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    check(directory, "model.safetensors", "no tensor")


def test_bytes_after_the_last_tensor(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0" * 8)
    check(directory, str(file), "damaged")


def test_missing_shard(sharded):
    shard = max(sharded.glob("*.safetensors"))
    shard.unlink()
    check(sharded, str(shard), "is missing", "model.safetensors.index.json")


def test_index_that_is_wrong(sharded):
    index = sharded / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map=weights | {NORM: min(set(weights.values()) - {weights[NORM]})})
    check(sharded, NORM, "model.safetensors.index.json")


def test_left_over_there(directory):
    change_header(directory / "model.safetensors", lambda header: header.update(extra=header.pop(NORM)))
    check(directory, NORM, "model.safetensors", "missing")
    change_json(directory / "config.json", num_hidden_layers=2)
    ORIGINALS["siglip vision"]().save_pretrained(directory)
    change_json(directory / "config.json", num_hidden_layers=2)
    check(directory, "encoder.layers.2", "left over", str(directory / "model.safetensors"))


def test_shape_that_disagrees(directory):
    change_json(directory / "config.json", intermediate_size=40)
    check(directory, "mlp.fc1", "(48", "(40", "config.json", "model.safetensors")


def test_unknown_dtype(directory):
    change_header(directory / "model.safetensors", lambda header: header[NORM].update(dtype="F8_E4M3"))
    check(directory, NORM, "F8_E4M3", "model.safetensors")


def test_only_a_pickle(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    check(directory, "pickle", "pytorch_model.bin", "model.safetensors")


def test_nothing_there(directory):
    (directory / "model.safetensors").unlink()
    check(directory, str(directory), "model.safetensors", "fetch")
    (directory / "config.json").unlink()
    check(directory, "config.json", "fetch")
    check(directory / "deeper", "config.json", "*.safetensors")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "llama"}, ["llama", "none of", "siglip"]),
        ({"hidden_act": "relu"}, ["hidden_act", "relu", "gelu_pytorch_tanh"]),
        ({"vision_use_head": False}, ["vision_use_head"]),
    ],
)
def test_not_implemented(directory, settings, words):
    change_json(directory / "config.json", **settings)
    check(directory, "config.json", *words)


def test_config_that_is_no_json(directory):
    (directory / "config.json").write_text("{")
    check(directory, "config.json", "JSON")


def test_missing_key(tmp_path):
    ORIGINALS["qwen_vl"]().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["text_config"]["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    check(tmp_path, "'hidden_size'", "config.json")


def test_target_that_cannot_be_written(directory, tmp_path):
    loaded = pretrained.load(directory)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="there already"):
        pretrained.export(loaded.params, loaded.config, directory)
    with pytest.raises(UserError, match="cannot write"):
        pretrained.export(loaded.params, loaded.config, directory / "config.json" / "deeper")
    assert sorted(tmp_path.rglob("*")) == before


def test_failure_leaves_nothing(directory, tmp_path, monkeypatch):
    loaded = pretrained.load(directory)
    before = sorted(tmp_path.rglob("*"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        pretrained.export(loaded.params, loaded.config, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
