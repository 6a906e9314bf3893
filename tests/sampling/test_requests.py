"""Requests from JSON: what they mean, and each mistake as one sentence that names the request."""

import json

import pytest

from mmcore_jax.config import UserError
from mmcore_jax.sampling import requests
from tests import rows


@pytest.fixture
def read(tmp_path):
    """Jobs of a JSON value, whose file lies in a folder with the image a.png."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(rows.png(1))
    (tmp_path / "in/text.png").write_text("no image")

    def read(value):
        path = tmp_path / "in/file.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return requests.read_requests(path, tmp_path / "out", 5)

    return read


def test_what_they_mean(read, tmp_path):
    listed = [
        {"prompt": "x", "output": "x.png"},
        {"prompt": "y", "images": ["a.png"], "output": "y.PNG", "seed": 0, "size": "8x24", "negative": "z"},
    ]
    first, second = read(listed)
    assert (first.seed, first.output) == (5, tmp_path / "out/x.png")
    assert (second.seed, second.output) == (0, tmp_path / "out/y.PNG")
    assert (first.size, second.size) == (None, (8, 24))
    assert (first.negative, second.negative) == (None, "z")
    assert requests.images_of(first.request) == []
    assert requests.images_of(second.request) == [rows.png(1)]
    assert [segment["type"] for segment in second.request["segments"]] == ["image", "text", "image"]
    assert requests.prompt_of(second.request) == "y"


X = {"prompt": "x", "output": "x.png"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "holds no list of requests"),
        ({}, "holds no list of requests"),
        ("[{", "is not JSON"),
        (["x"], r"requests\[0\] in .*file.json is 'x', expected the settings"),
        ([X, {"prompt": "y"}], r"missing key requests\[1\].output in .*file.json"),
        ([X | {"promt": "x"}], r"unknown key requests\[0\].promt in .*did you mean 'prompt'"),
        ([X | {"prompt": 1}], r"requests\[0\].prompt in .* is 1 of type int, expected str"),
        ([X | {"prompt": " "}], r"requests\[0\].prompt in .* is empty"),
        ([X | {"prompt": "\ud800"}], r"requests\[0\].prompt in .* is not text"),
        ([X | {"negative": ""}], r"requests\[0\].negative in .* is empty"),
        ([X | {"images": "a.png"}], r"requests\[0\].images in .* is 'a.png' of type str"),
        ([X | {"images": [1]}], r"requests\[0\].images\[0\] in .* is 1 of type int"),
        ([X | {"images": ["b.png"]}], r"requests\[0\] in .*: the image .*b.png cannot be read: No such file"),
        ([X | {"images": ["text.png"]}], r"requests\[0\] in .*: the image .*text.png cannot be used: image has no"),
        ([X | {"seed": "1"}], r"requests\[0\].seed in .* is '1' of type str"),
        ([X | {"size": "16"}], r"requests\[0\].size in .* is '16', expected HEIGHTxWIDTH"),
        ([X | {"seed": -1}], r"requests\[0\].seed in .* is -1, expected a number from 0"),
        ([X | {"output": "x.jpg"}], r"requests\[0\].output in .* is 'x.jpg', expected the name of a .png"),
        ([X | {"output": "../x.png"}], r"requests\[0\].output in .* is '../x.png', expected the name"),
        ([X | {"output": "sheet.png"}], r"requests\[0\].output in .* is 'sheet.png'"),
        ([X, X | {"prompt": "y"}], r"requests\[1\].output in .* is 'x.png', as an earlier request's"),
    ],
)
def test_mistakes(read, value, words):
    with pytest.raises(UserError, match=words):
        read(value)
