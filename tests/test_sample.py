"""The door `sample` on a tiny run whose parameters are random."""

import functools
import io
import json
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from mmcore_jax import __version__, sample
from tests import tiny


@pytest.fixture(scope="module")
def workdir(data, tmp_path_factory) -> pathlib.Path:
    config = tiny.config("stage2", data, "--config.sampling.steps=2")
    return tiny.write_run(tmp_path_factory.mktemp("run"), config)


@pytest.fixture(scope="module")
def load_generator():
    """What the door loads a run by, which all tests do once."""
    return functools.cache(sample.load_generator)


@pytest.fixture
def enter(monkeypatch, capsys, workdir, load_generator):
    """Runs the door with arguments and lines of input, and returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(sample, "load_generator", load_generator)

    def enter(*arguments: object, lines: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sample", f"--workdir={workdir}", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        with pytest.raises(SystemExit) as stopped:
            sample.main()
        return stopped.value.code, *capsys.readouterr()

    return enter


def pixels(path: pathlib.Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_each_picture_is_that_of_its_seed_and_says_how_it_was_made(enter, workdir, tmp_path):
    """In a row of seeds, among other requests, in a conversation and by itself."""
    seeds = ("--seed=4", "--num=3", "--batch_size=2", "--negative=black")
    assert enter("--prompt=a red dot", f"--output={tmp_path / 'dot.png'}", "--scale=2", *seeds)[0] == 0
    numbered = [tmp_path / f"dot_{seed}.png" for seed in (4, 5, 6)]
    assert np.abs(pixels(numbered[0]) - pixels(numbered[1])).max() > 10
    assert Image.open(tmp_path / "dot_sheet.png").width > 3 * 256

    code, said, _ = enter("--prompt=a red dot", f"--output={tmp_path / 'six.png'}", "--seed=6", "--scale=2", *seeds[3:])
    assert code == 0
    assert "'a red dot', seed 6" in said
    np.testing.assert_array_equal(pixels(tmp_path / "six.png"), pixels(numbered[2]))
    assert Image.open(tmp_path / "six.png").size == (32, 32)
    assert Image.open(tmp_path / "six.png").text == Image.open(numbered[2]).text == {
        "prompt": "a red dot", "negative": "black", "images": "", "seed": "6",
        "steps": "2", "text_scale": "2.0", "visual_scale": "2.0", "image_scale": "1.0", "timestep_shift": "3.0",
        "timestep_shift_tokens": "0",
        "timestep_spacing": "trailing", "scale": "2", "solver": "euler", "guidance_interval": "(0.0, 1.0)",
        "renormalisation": "0.0", "size": "16x16",
        "workdir": str(workdir), "checkpoint_step": "20", "run": "", "mmcore_jax": __version__,
    }  # fmt: skip

    lines = "/seed 6\na red dot\n/image nowhere.png\nnow a bar\n"
    talk = ("--interactive", f"--output={tmp_path / 'talk'}", "--scale=2", *seeds[3:])
    code, said, errors = enter(*talk, lines=lines)
    assert code == 0
    assert errors == "error: the image nowhere.png cannot be read: No such file or directory.\n"
    turns = [tmp_path / f"talk/turn_{number:02d}.png" for number in (1, 2)]
    assert all(str(turn) in said for turn in turns)
    np.testing.assert_array_equal(pixels(turns[0]), pixels(numbered[2]))
    assert np.abs(pixels(turns[1]) - pixels(turns[0])).max() > 10
    assert Image.open(turns[1]).text["prompt"] == "a red dot\nnow a bar"


def test_requests_are_drawn_once(enter, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/dot.png").write_bytes(tiny.drawing("red", "dot"))
    listed = [
        {"prompt": "a red dot", "output": "dot.png"},
        {"prompt": "make it blue", "images": ["dot.png"], "output": "blue.png", "seed": 3, "negative": "red"},
        {"prompt": "a red dot", "output": "other.png", "seed": 3, "size": "8x16"},
    ]
    (tmp_path / "in/requests.json").write_text(json.dumps(listed))
    output = tmp_path / "new/out"
    arguments = (f"--requests={tmp_path / 'in/requests.json'}", f"--output={output}")

    def draw(*more: str) -> tuple[str, dict[str, bytes]]:
        code, said, errors = enter(*arguments, *more)
        assert code == 0, errors
        return said, {path.name: path.read_bytes() for path in output.iterdir()}

    said, first = draw()
    assert "3 of 3 pictures drawn" in said
    assert set(first) == {"dot.png", "blue.png", "other.png", "sheet.png"}
    sizes = {name: Image.open(output / name).size for name in ("dot.png", "blue.png", "other.png")}
    assert sizes == {"dot.png": (256, 256), "blue.png": (256, 256), "other.png": (256, 128)}
    assert Image.open(output / "other.png").text["size"] == "8x16"
    negatives = {name: Image.open(output / name).text["negative"] for name in sizes}
    assert negatives == {"dot.png": "", "blue.png": "red", "other.png": ""}
    (output / "other.png").unlink()
    (output / "dot.png").write_bytes(first["dot.png"][:-40])
    said, second = draw()
    assert "1 of 3 pictures are there already" in said
    assert second == first
    assert "3 of 3 pictures are there already" in draw()[0]
    (tmp_path / "in/dot.png").write_bytes(tiny.drawing("black", "dot"))
    said, third = draw()
    assert "1 of 3 pictures drawn" in said
    assert {name for name in first if third[name] != first[name]} == {"blue.png", "sheet.png"}


def test_nothing_is_loaded_where_nothing_is_to_be_drawn(enter, workdir, tmp_path, monkeypatch):
    """A rerun reads no checkpoint, and other settings are other pictures."""
    arguments = ("--prompt=a red dot", f"--output={tmp_path / 'dot.png'}", "--num=1")
    assert enter(*arguments)[0] == 0
    monkeypatch.setattr(sample, "load_generator", lambda workdir: pytest.fail("the run is loaded"))
    assert enter(*arguments)[0] == 0
    (workdir / "run_id").write_text("trained anew")
    with pytest.raises(pytest.fail.Exception):
        enter(*arguments)
    (workdir / "run_id").unlink()
    for change in ("--text_scale=1", "--image_scale=2", "--negative=blue", "--scale=9", "--steps=1", "--size=8x16"):
        with pytest.raises(pytest.fail.Exception):
            enter(*arguments, change)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt= "], ["--prompt is empty"]),
        (["--prompt=x", "--negative= "], ["--negative is empty: say what not to draw, or leave it out"]),
        (
            ["--prompt=x", "--negative=y", "--text_scale=1", "--visual_scale=1"],
            ["negative prompt of x.png does nothing"],
        ),
        (
            ["--interactive", "--output=out", "--negative=y", "--text_scale=1", "--visual_scale=1"],
            ["negative prompt of --interactive does nothing"],
        ),
        (["--prompt=x", "--scale=501"], ["x.png would have 8016 x 8016 pixels", "give --scale less than 501"]),
        (["--prompt=x", "--output=x.jpg"], ["x.jpg", ".png"]),
        (["--prompt=x", "--output=nowhere/x.png"], ["nowhere", "does not exist"]),
        (["--prompt=x", "--image", "missing.png"], ["--image missing.png", "No such file"]),
        (["--prompt=x", "--image", "text.png"], ["--image text.png cannot be used"]),
        (["--prompt=x", "--image", "a.png", "a.png", "a.png"], ["x.png gives 3 images", "trained with 3", "give 2"]),
        (["--prompt=x", *["--image", "a.png"] * 3], ["x.png gives 3 images", "trained with 3", "give 2"]),
        (["--prompt=x", "--seed=-1"], ["--seed is -1", "from 0 to"]),
        (["--prompt=x", f"--seed={2**32 - 1}", "--num=2"], ["last seed of --num", "from 0 to"]),
        (["--prompt=x", "--num=0"], ["--num is 0"]),
        (["--prompt=x", "--steps=0"], ["--steps is 0"]),
        (["--prompt=x", "--size=16"], ["--size is '16', expected HEIGHTxWIDTH"]),
        (["--prompt=x", "--size=8x15"], ["--size 8x15 must be a multiple of 4"]),
        (["--interactive", "--output=out", "--size=4x20"], ["--size 4x20 makes 5 latent patches a side"]),
        (["--requests=odd.json", "--output=out"], ["the size 8x15 of out/odd.png must be a multiple of 4"]),
        (["--prompt=x", "--workdir=."], ["config.json does not exist"]),
        (["--interactive", "--num=2"], ["--num goes with --prompt only"]),
        (["--interactive", "--image", "a.png"], ["--image goes with --prompt only"]),
        (["--interactive", "--output=text.png/out"], ["--output text.png/out cannot be made a directory"]),
        (["--requests=no.json", "--output=out"], ["--requests no.json cannot be read"]),
        (["--requests=many.json", "--output=out"], ["out/many.png gives 3 images", "config.data.budgets.images"]),
    ],
)
def test_mistakes(enter, tmp_path, monkeypatch, arguments: list[str], words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "a.png").write_bytes(tiny.drawing("red", "dot"))
    many = [{"prompt": "x", "images": ["a.png"] * 3, "output": "many.png"}]
    (tmp_path / "many.json").write_text(json.dumps(many))
    (tmp_path / "odd.json").write_text(json.dumps([{"prompt": "x", "output": "odd.png", "size": "8x15"}]))
    monkeypatch.setattr(sample, "load_generator", lambda workdir: pytest.fail("the run is loaded"))
    code, _, errors = enter("--output=x.png", *arguments)
    assert code == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    for word in words:
        assert word in errors


def test_a_directory_that_is_not_ours(enter, tmp_path, monkeypatch):
    """Asked of the system, which lets the superuser write anywhere."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    code, _, errors = enter("--prompt=x", f"--output={tmp_path / 'x.png'}")
    assert (code, errors) == (2, f"error: --output: you may not write to the directory {tmp_path}.\n")
