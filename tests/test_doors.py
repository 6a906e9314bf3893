"""Bad input through the real doors: one clear sentence, exit code 2, nothing lost."""

import dataclasses
import subprocess
import sys

import pytest

from mmcore_jax import config as config_lib
from mmcore_jax import convert, pretrained, sample, train
from tests import tiny


@pytest.fixture
def enter(monkeypatch, capsys):
    """Runs a door with arguments and returns (exit code, stderr)."""

    def enter(door, *arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(tiny.REPOSITORY)
        monkeypatch.setattr(sys, "argv", ["door", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            door()
        return stopped.value.code, capsys.readouterr().err

    return enter


def check(result: tuple[int, str], *words: str) -> None:
    code, error = result
    assert code == 2, error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in error
    for word in words:
        assert word in line, line


PARTS = ("vlm", "queries", "connector")
STAGE0 = "--config=configs/stage0.py"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/stage9.py"], ["configs/stage9.py", "does not exist"]),
        (["--config=configs/stage0.py:openmojo"], ["openmojo", "did you mean 'openmoji'"]),
        (
            [STAGE0, "--config.optimizer.learning_rat=1"],
            ["config.optimizer.learning_rat", "did you mean 'learning_rate'"],
        ),
        ([STAGE0, "--config.bad_steps.deviation=3"], ["config.bad_steps.deviation", "did you mean 'deviations'"]),
        ([STAGE0, "--config.sed=1"], ["config.sed", "did you mean 'seed'"]),
        ([STAGE0, "--config.total_steps=many"], ["config.total_steps", "'many'", "expected int"]),
        ([STAGE0, "--config.batch_size=1.5"], ["config.batch_size", "1.5", "expected int"]),
        ([STAGE0, "--config.optimizer.decay=step"], ["config.optimizer.decay", "'constant', 'linear', 'cosine'"]),
        ([STAGE0, "--config.optimizer=None"], ["config.optimizer", "Optimizer"]),
        ([STAGE0, "--config.mesh.data=3"], ["data 3", "does not divide"]),
        ([STAGE0, "--config.optimizer.accumulation=3"], ["config.batch_size 128", "multiple of 3"]),
        ([STAGE0, "--steps=3"], ["--steps=3", "--config.KEY=VALUE"]),
    ],
)
def test_bad_settings(enter, tmp_path, arguments: list[str], words: list[str]) -> None:
    check(enter(train.main, *arguments, f"--workdir={tmp_path / 'run'}"), *words)
    assert not (tmp_path / "run").exists()


def test_missing_key(enter, tmp_path) -> None:
    (tmp_path / "openmoji.py").write_text((tiny.REPOSITORY / "configs/openmoji.py").read_text())
    text = (tiny.REPOSITORY / "configs/stage0.py").read_text()
    (tmp_path / "mine.py").write_text(text.replace("seed=0,", ""))
    check(enter(train.main, f"--config={tmp_path / 'mine.py'}"), "missing key config.seed", "mine.py")


def test_missing_data(enter, tmp_path) -> None:
    arguments = [f"--workdir={tmp_path / 'run'}", *tiny.overrides("stage0", tmp_path / "nowhere")]
    check(enter(train.main, STAGE0, *arguments), "nowhere", "prepare")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("data.sources.caption.shards=nowhere", ["'caption' finds no shards at nowhere"]),
        ("gauges.sources.caption.shards=nowhere", ["'caption' finds no shards at nowhere"]),
        ("data.tokenizer=nowhere", ["no tokenizer in nowhere"]),
    ],
)
def test_missing_data_is_named_before_weights_are_loaded(enter, data, tmp_path, monkeypatch, missing, words) -> None:
    monkeypatch.setattr(train, "initial_params", lambda *_: pytest.fail("weights are loaded"))
    arguments = [f"--workdir={tmp_path / 'run'}", *tiny.overrides("stage1", data), "--config.init.vision_target=random"]
    arguments += ["--config.gauges.every=4", f"--config.{missing}"]
    check(enter(train.main, "--config=configs/stage1.py", *arguments), *words)


def test_missing_shard(enter, tmp_path) -> None:
    data = tiny.write_dataset(tmp_path / "data")
    whole = data / "text_to_image-train-00000-of-00001.array_record"
    whole.rename(data / "text_to_image-train-00001-of-00002.array_record")
    arguments = [f"--workdir={tmp_path / 'run'}", *tiny.overrides("stage0", data)]
    check(enter(train.main, STAGE0, *arguments), "text_to_image-train-00000-of-00002.array_record")


def test_unwritable_workdir(enter, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    check(enter(train.main, STAGE0, f"--workdir={tmp_path / 'file/run'}"), "cannot write", "file/run")


def test_missing_predecessor_says_how_to_make_it(enter, data, tmp_path) -> None:
    arguments = [*tiny.overrides("stage1", data), f"--config.init.vision_target={tmp_path / 'stage0-openmoji'}"]
    result = enter(train.main, "--config=configs/stage1.py", f"--workdir={tmp_path / 'run'}", *arguments)
    check(result, "vision_target", "python -m mmcore_jax.train --config=configs/stage0.py:openmoji")


QWEN = ("config.json, model*.safetensors, tokenizer.json, tokenizer_config.json", "preprocessor_config.json")


@pytest.mark.parametrize(
    ("stage", "part", "source", "words"),
    [
        ("stage2", "vlm", "Qwen2.5-VL-3B-Instruct", ("model.safetensors.index.json, if in shards", *QWEN)),
        ("stage1", "vision_target", "siglip-so400m", ("config.json, model*.safetensors (and", "SigLIP")),
        ("stage2", "dit", "sd3", ("model_index.json, transformer/config.json, transformer/diffusion_pytorch_model*",)),
        ("stage2", "dit", "sd3/transformer", ("fetch config.json, diffusion_pytorch_model*.safetensors (and",)),
        ("stage2", "autoencoder", "sd3", ("vae/config.json, vae/diffusion_pytorch_model*.safetensors",)),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_missing_checkpoint_says_what_to_fetch(enter, data, tmp_path, stage, part, source, words, there) -> None:
    """Whether its directory is there and empty, or not; and before the data is read."""
    directory = tmp_path / source
    if there:
        directory.mkdir(parents=True)
    init = dict.fromkeys(tiny.config(stage, data).init, "random") | {part: str(directory)}
    arguments = [*tiny.overrides(stage, tmp_path / "nowhere"), f"--config.init={init}"]
    result = enter(train.main, f"--config=configs/{stage}.py", f"--workdir={tmp_path / 'run'}", *arguments)
    check(result, f"config.init.{part}", f"from {directory},", "put them there", *words)
    assert "mmcore_jax.train" not in result[1]


@pytest.mark.parametrize("source", ["runs/mine", "stage1-openmoji"])
def test_missing_run_says_its_command(enter, data, tmp_path, source) -> None:
    init = dict.fromkeys(tiny.config("stage2", data).init, "random") | {"vlm": str(tmp_path / source)}
    arguments = [*tiny.overrides("stage2", data), f"--config.init={init}", f"--workdir={tmp_path / 'run'}"]
    result = enter(train.main, "--config=configs/stage2.py", *arguments)
    check(result, "config.init.vlm", "python -m mmcore_jax.train --config=configs/", f"--workdir={tmp_path / source}")
    assert "safetensors" not in result[1]


def test_workdir_of_another_run(data, tmp_path, enter) -> None:
    """Which is in processes of its own, as a user meets it, and goes on unharmed."""
    arguments = [f"--workdir={tmp_path / 'run'}", *tiny.overrides("stage0", data)]
    first = tiny.command("train", STAGE0, *arguments)
    assert subprocess.run(first, cwd=tiny.REPOSITORY, capture_output=True).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for change in ("--config.seed=7", "--config.model.vision_target.vision.width=64"):
        result = enter(train.main, STAGE0, *arguments, change)
        check(result, str(tmp_path / "run"), "belongs to another run", "--workdir")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    threads = subprocess.run([*first, "--config.data.threads=1"], cwd=tiny.REPOSITORY, capture_output=True, text=True)
    assert "is done: step 20 of 20" in threads.stdout, threads.stderr
    check(enter(sample.main, f"--workdir={tmp_path / 'run'}", "--prompt=x", "--output=x.png"), "stage0", "stage 2")
    exported = tmp_path / "exported"
    assert enter(convert.main, f"--from={tmp_path / 'run'}", "--part=vision_target", f"--to={exported}")[0] == 0
    trained = config_lib.from_json(tmp_path / "run/config.json").model.vision_target
    found = pretrained.load(exported).config
    assert dataclasses.replace(found, initial_bias=trained.initial_bias) == trained  # which weights do not tell


def test_a_start_that_fails_leaves_the_workdir_free(enter, data, tmp_path) -> None:
    """What was wrong, a batch or the data, may then be put right there."""
    arguments = [f"--workdir={tmp_path / 'run'}", *tiny.overrides("stage0", data), "--config.total_steps=1"]
    nowhere = [f"--config.data.sources.{name}.shards=nowhere" for name in tiny.config("stage0", data).data.sources]
    check(enter(train.main, STAGE0, *arguments, *nowhere), "no shards")
    assert (tmp_path / "run/config.json").is_file()
    assert enter(train.main, STAGE0, *arguments, "--config.seed=3")[0] == 0
    check(enter(train.main, STAGE0, *arguments), "belongs to another run")


def test_not_finite_stops_and_names_the_batch(enter, data, tmp_path) -> None:
    arguments = [f"--workdir={tmp_path / 'run'}", *tiny.overrides("stage0", data), "--config.optimizer.warmup_steps=1"]
    arguments += ["--config.checkpoint.every=1", "--config.bad_steps.in_a_row=2", "--config.bad_steps.rollbacks=0"]
    result = enter(train.main, STAGE0, *arguments, "--config.optimizer.learning_rate=1e30")
    check(result, "2 bad steps in a row", "bad_steps.jsonl")
    assert "text_to_image/" in (tmp_path / "run/bad_steps.jsonl").read_text()


def test_another_tokenizer_is_noticed(enter, tmp_path) -> None:
    """A stage that starts from a VLM trained with other token ids, or positions, stops instead of reading noise."""
    data = tiny.write_dataset(tmp_path / "data")
    arguments = [*tiny.overrides("stage1", data), "--config.total_steps=1", "--config.init.vision_target=random"]
    enter(train.main, "--config=configs/stage1.py", f"--workdir={tmp_path / 'one'}", *arguments)
    arguments = [*tiny.overrides("stage2", data), *(f"--config.init.{part}={tmp_path / 'one'}" for part in PARTS)]
    other = "--config.model.vlm.rope_theta=5e5"
    result = enter(train.main, "--config=configs/stage2.py", f"--workdir={tmp_path / 'two'}", *arguments, other)
    check(result, "another network", "config.model.vlm.rope_theta is 500000.0 and must be")
    path = data / "tokenizer/tokenizer.json"
    path.write_text(path.read_text() + "\n")
    result = enter(train.main, "--config=configs/stage2.py", f"--workdir={tmp_path / 'two'}", *arguments)
    check(result, "tokenizer", "anew")
