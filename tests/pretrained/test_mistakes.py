"""Bad checkpoints: one sentence that names the file, the tensor, and what to do; and nothing left behind."""

import copy
import functools
import json
import struct
import sys

import pytest

from mmcore_jax import convert, pretrained
from mmcore_jax.config import UserError
from mmcore_jax.pretrained import files
from mmcore_jax.pretrained.model import open_published
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
    check(tmp_path, "'text_config.hidden_size'", "config.json")


# --- Wrong values in config.json: a directory without weights, which are missed only where the config is accepted -----

WRONG = ("nonsense", None, -1, 2.5, True, [], [7, "7"], [{}])


@pytest.fixture
def converted(monkeypatch, capsys, tmp_path):
    """What the door says of a config.json whose `path` has another value."""

    def converted(settings: dict, path: str, value: object) -> str:
        changed = copy.deepcopy(settings)
        *sections, key = path.split(".")
        section = changed
        for name in sections:
            section = section[name]
        section[key] = value
        (tmp_path / "config.json").write_text(json.dumps(changed))
        monkeypatch.setattr(sys, "argv", ["convert", f"--from={tmp_path}", f"--to={tmp_path / 'out'}"])
        with pytest.raises(SystemExit) as stopped:
            convert.main()
        assert stopped.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return converted


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What the original's `save_pretrained` writes into config.json, without its weights."""

    @functools.cache
    def written(name: str) -> dict:
        directory = tmp_path_factory.mktemp("original")
        ORIGINALS[name]().save_pretrained(directory)
        return json.loads((directory / "config.json").read_text())

    return written


def paths(settings: dict, before: str = "") -> list[str]:
    found = [f"{before}{key}" for key in settings]
    for key, value in settings.items():
        found += paths(value, f"{before}{key}.") if isinstance(value, dict) else []
    return found


@pytest.mark.parametrize("name", ["qwen_vl", "siglip", "siglip vision", "siglip2", "sd3.5 dual", "autoencoder"])
def test_wrong_values(converted, written, name, tmp_path):
    """A value of another type, of each key of the file: it is refused by name, or what is read does not change."""
    settings, refused = written(name), set()
    (tmp_path / "config.json").write_text(json.dumps(settings))
    expected = open_published(tmp_path).config
    for path in set(paths(settings)) - {"model_type", "architectures", "_class_name"}:
        for value in WRONG:
            line = converted(settings, path, value)
            if f"{tmp_path} has no weights" not in line:
                assert path.split(".")[-1] in line, (value, line)
                assert str(tmp_path / "config.json") in line, (path, value, line)
                refused.add(path)
            elif value == "nonsense":
                assert open_published(tmp_path).config == expected, path
    assert len(refused) > 8


@pytest.mark.parametrize("value", [5, None, [], {}, [["x"]]])
@pytest.mark.parametrize("key", ["model_type", "architectures"])
def test_wrong_values_of_what_names_the_family(directory, key, value):
    change_json(directory / "config.json", **{"model_type": None, "architectures": None, key: value})
    check(directory, "config.json", "describes", "none of")


@pytest.mark.parametrize(
    ("name", "path", "value", "words"),
    [
        ("qwen_vl", "text_config.num_attention_heads", 5, ["text_config.hidden_size", "48", "num_attention_heads, 5"]),
        ("qwen_vl", "text_config.num_key_value_heads", 4, ["text_config.num_attention_heads", "key_value_heads, 4"]),
        ("qwen_vl", "text_config.num_hidden_layers", "3", ["text_config.num_hidden_layers", "'3'", "expected int"]),
        ("qwen_vl", "text_config.rope_parameters.mrope_section", [2, 1], ["mrope_section", "2 values", "expected 3"]),
        ("qwen_vl", "text_config.rope_parameters.mrope_section", [2, 2, 2], ["mrope_section", "sum of 4"]),
        ("qwen_vl", "text_config.rope_parameters.rope_type", "yarn", ["rope_type", "'yarn'"]),
        ("qwen_vl", "vision_config.num_heads", 3, ["vision_config.hidden_size", "32", "3 num_heads"]),
        ("qwen_vl", "vision_config.window_size", 20, ["vision_config.window_size", "20", "multiple of 8"]),
        ("qwen_vl", "vision_config.out_hidden_size", 64, ["vision_config.out_hidden_size", "64", "expected 48"]),
        ("siglip", "vision_config.num_attention_heads", 3, ["vision_config.hidden_size", "num_attention_heads, 3"]),
        ("siglip", "text_config.num_attention_heads", 3, ["text_config.hidden_size", "num_attention_heads, 3"]),
        ("siglip", "vision_config.image_size", 3, ["vision_config.image_size", "at least patch_size 4"]),
        ("siglip", "text_config.projection_size", 24, ["text_config.projection_size", "24", "hidden_size 32"]),
        ("siglip", "vision_config.patch_size", 0, ["vision_config.patch_size", "at least 1"]),
        ("siglip vision", "hidden_size", -32, ["hidden_size", "-32", "at least 1"]),
        ("siglip2", "vision_config.num_patches", None, ["vision_config.num_patches", "None", "expected int"]),
        ("sd3.5 dual", "num_attention_heads", 5, ["caption_projection_dim", "72", "120"]),
        ("sd3.5 dual", "dual_attention_layers", [1, 2], ["dual_attention_layers", "first layers"]),
        ("sd3.5 dual", "dual_attention_layers", [0, 1, 2, 3], ["dual_attention_layers", "fewer than num_layers 4"]),
        ("sd3.5 dual", "pos_embed_max_size", 23, ["pos_embed_max_size", "even"]),
        ("sd3.5 dual", "sample_size", 1, ["sample_size", "at least patch_size 2"]),
        ("sd3.5 dual", "out_channels", 8, ["out_channels", "8", "in_channels 4"]),
        ("autoencoder", "norm_num_groups", 3, ["block_out_channels", "norm_num_groups 3"]),
        ("autoencoder", "block_out_channels", [8, 16], ["down_block_types", "expected 2"]),
        ("autoencoder", "down_block_types", ["AttnDownBlock2D"] * 3, ["down_block_types[0]", "'DownEncoderBlock2D'"]),
        ("autoencoder", "scaling_factor", 0, ["scaling_factor", "more than 0"]),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(converted, written, tmp_path, name, path, value, words):
    line = converted(written(name), path, value)
    for word in [*words, str(tmp_path / "config.json")]:
        assert word in line, line


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
