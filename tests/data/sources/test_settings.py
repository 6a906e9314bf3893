"""Settings of sources, told apart by `kind`."""

import dataclasses
import json

import pytest

from mmcore_jax import config
from mmcore_jax.config import Column, UserError
from mmcore_jax.data.sources import open_source
from tests.tiny import REPOSITORY

CAPTION = {"type": "text", "column": "caption", "speaker": "assistant"}
GIVEN = {
    "native": {"kind": "array_record", "shards": "a-*.array_record", "weight": 1},
    "tars": {"kind": "webdataset", "shards": ["a.tar", "b.tar"], "weight": 2.0, "task": "t", "segments": [CAPTION]},
    "tables": {"kind": "parquet", "shards": ("a.parquet",), "weight": 1.0, "segments": None},
    "lines": {"kind": "json_lines", "shards": "a.jsonl", "images": "images", "weight": 1.0},
    "tensorflow": {"kind": "tfds", "name": "pairs:1.0.0", "split": "train", "weight": 1.0, "segments": [CAPTION]},
}


def convert(**changes):
    return config.from_dict(dict[str, config.Source], GIVEN | changes, "config.data.sources", "x.py")


def test_every_kind():
    sources = convert()
    classes = [config.ArrayRecord, config.WebDataset, config.Parquet, config.JsonLines, config.Tfds]
    assert [type(source) for source in sources.values()] == classes
    assert sources["native"].weight == 1.0
    assert sources["tars"].shards == ("a.tar", "b.tar")
    assert sources["tars"].segments == (Column("text", "caption", "assistant", False),)
    assert sources["tables"].shards == ("a.parquet",)


def test_settings_survive_json():
    sources = convert()
    written = json.loads(json.dumps({name: dataclasses.asdict(source) for name, source in sources.items()}))
    assert config.from_dict(dict[str, config.Source], written, "config.data.sources", "x.py") == sources


def test_shards_from_the_command_line():
    file, key = str(REPOSITORY / "configs/stage0.py"), "--config.data.sources.text_to_image.shards"
    for given, expected in (("a.tar,b-{00..11}.tar", "a.tar,b-{00..11}.tar"), ("('a', 'b')", ("a", "b"))):
        assert config.load(file, [f"{key}={given}"]).data.sources["text_to_image"].shards == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"shards": "a", "weight": 1.0},
            r"config.data.sources.x.kind in x.py is None, expected one of 'array_record', ",
        ),
        ({**GIVEN["tars"], "kind": "webdatset"}, r"x.kind in x.py is 'webdatset', .*, did you mean 'webdataset'"),
        ({**GIVEN["native"], "segments": None}, r"unknown key config.data.sources.x.segments in x.py"),
        ({"kind": "json_lines", "shards": "a", "weight": 1.0}, r"missing key config.data.sources.x.images in x.py"),
        ({**GIVEN["native"], "shards": 5}, r"x.shards in x.py is 5 of type int, expected str"),
        ({**GIVEN["native"], "shards": [5]}, r"x.shards\[0\] in x.py is 5 of type int, expected str"),
        (
            {**GIVEN["tars"], "segments": [{"type": "image", "colunm": "jpg"}]},
            r"unknown key config.data.sources.x.segments\[0\].colunm in x.py, did you mean 'column'",
        ),
    ],
)
def test_mistakes(source, message):
    with pytest.raises(UserError, match=message):
        convert(x=source)


def test_a_mistake_names_its_source(tmp_path):
    source = dataclasses.replace(convert()["tables"], shards=str(tmp_path / "*.parquet"))
    with pytest.raises(UserError, match=r"data source 'photos' finds no shards at"):
        open_source("photos", source)
