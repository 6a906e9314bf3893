"""A tiny dataset and tiny versions of the shipped stages, for tests that run whole training steps."""

import io
import json
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from flax.traverse_util import flatten_dict
from PIL import Image

from mmcore_jax import config as config_lib
from mmcore_jax import train as train_lib
from mmcore_jax.config import Config
from mmcore_jax.data import example as example_lib
from mmcore_jax.data import packing
from mmcore_jax.data.text import keep_tokenizer, train_tokenizer
from mmcore_jax.mmcore import MMCORE
from mmcore_jax.training.checkpoint import Checkpoints
from mmcore_jax.training.state import Constants, State
from mmcore_jax.training.telemetry import read_metrics

REPOSITORY = pathlib.Path(__file__).parent.parent
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "black": (0, 0, 0)}
SHAPES = ("square", "bar", "dot")


def drawing(colour: str, shape: str, size: int = 16) -> bytes:
    """A PNG of a coloured shape on white."""
    pixels = np.full((size, size, 3), 255, np.uint8)
    span = {
        "square": (slice(4, 12), slice(4, 12)),
        "bar": (slice(6, 10), slice(1, 15)),
        "dot": (slice(6, 10), slice(6, 10)),
    }
    pixels[span[shape]] = COLOURS[colour]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def examples() -> dict[str, list[example_lib.Example]]:
    """A few examples of every task that the embedded recipes name."""
    text, image = example_lib.text, example_lib.image
    tasks: dict[str, list] = {}

    def add(task: str, *segments: dict) -> None:
        tasks.setdefault(task, []).append(
            {"id": f"{task}/{len(tasks.get(task, []))}", "task": task, "segments": list(segments)}
        )

    for shape in SHAPES:
        for colour in COLOURS:
            picture, name = drawing(colour, shape), f"a {colour} {shape}"
            for task in ("text_to_image", "text_to_image_core", "text_to_image_recolour"):
                add(task, text(name), image(picture, True))
            add("caption", image(picture), text("what is this?"), text(name, "assistant"))
            for task in ("edit_tone", "edit_gender", "edit_colour", "edit_recolour"):
                add(task, image(picture), text("make it red"), image(drawing("red", shape), True))
            add("compose", image(picture), image(drawing("red", "dot")), text("combine them"), image(picture, True))
    return tasks


def write_dataset(directory: pathlib.Path) -> pathlib.Path:
    """Writes shards and a tokenizer, laid out as `prepare` does."""
    directory.mkdir(parents=True, exist_ok=True)
    words = []
    for task, items in examples().items():
        writer = ArrayRecordWriter(str(directory / f"{task}-train-00000-of-00001.array_record"), "group_size:1")
        for item in items:
            writer.write(example_lib.encode(item))
            words += [segment["text"] for segment in item["segments"] if segment["type"] == "text"]
        writer.close()
    train_tokenizer(words, 320, directory / "tokenizer")
    return directory


def elsewhere(file: str, data: pathlib.Path) -> dict[str, Any]:
    """Settings by which a recipe reads the dataset at `data`."""
    sources = config_lib.load(file).data.sources
    shards = {f"data.sources.{name}.shards": data / pathlib.Path(one.shards).name for name, one in sources.items()}
    return shards | {"data.tokenizer": data / "tokenizer", "data.index": data / "index"}


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as overrides on the command line."""
    return [f"--config.{name}={value}" for name, value in settings.items()]


def overrides(stage: str, data: pathlib.Path) -> list[str]:
    """Command-line overrides that shrink the shipped recipe of a stage and point it at `data`."""
    settings = elsewhere(str(REPOSITORY / f"configs/{stage}.py"), data)
    settings |= {"data.window": 64, "execution.scan_layers": True}
    if stage != "stage0":
        settings["data.vlm_pixels"] = (256, 256)
    settings |= {"total_steps": 20, "telemetry.log_every": 1, "telemetry.sample_every": 0, "checkpoint.every": 5}
    if stage != "stage0":
        settings["gauges.every"] = 0
    settings |= {"optimizer.warmup_steps": 4, "optimizer.ema_decay": 0.9}
    tower = {"width": 32, "depth": 2, "heads": 2, "mlp_width": 64}
    settings |= {f"model.vision_target.vision.{name}": value for name, value in {**tower, "image_size": 16}.items()}
    if stage == "stage0":
        settings |= {f"model.vision_target.text.{name}": value for name, value in {**tower, "vocab_size": 320}.items()}
        settings |= {"batch_size": 16}
    else:
        vlm = {**tower, "kv_heads": 1, "vocab_size": 320, "mrope_section": (2, 3, 3)}
        settings |= {f"model.vlm.{name}": value for name, value in vlm.items()}
        settings |= {f"model.vlm.vision.{name}": value for name, value in tower.items()}
        budgets = {"vlm_tokens": 64, "vision_patches": 32, "images": 3}
        if stage.startswith("stage2"):
            settings["data.image_size"] = 16
            settings |= {f"model.dit.{name}": tower[name] for name in ("width", "depth", "heads")}
            settings |= {"model.dit.context_width": 32, "model.dit.position_grid": 4, "model.dit.position_base": 4}
            budgets |= {"context_tokens": 40, "latent_tokens": 48}
        settings |= {"batch_size": 8, "model.connector.width": 32}
        settings |= {f"data.budgets.{name}": value for name, value in budgets.items()}
    if stage.startswith("stage2"):
        settings = {name: value for name, value in settings.items() if "vision_target" not in name}
    return flags(settings)


def config(stage: str, data: pathlib.Path, *extra: str, random: bool = True) -> Config:
    """The tiny config of a stage; with `random`, every part starts from random weights."""
    given = [*overrides(stage, data), *extra]
    file = str(REPOSITORY / f"configs/{stage}.py")
    if random:
        given += [f"--config.init.{part}=random" for part in config_lib.load(file).init]
    return config_lib.load(file, given)


def train(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    """Trains in this process, which keeps its way to take SIGTERM."""
    handler = signal.getsignal(signal.SIGTERM)
    train_lib.train(config, workdir)
    signal.signal(signal.SIGTERM, handler)
    return workdir


def write_run(workdir: pathlib.Path, config: Config, steps: tuple[int, ...] = ()) -> pathlib.Path:
    """Writes the workdir of a finished run, or of one that has saved after `steps`.

    Its parameters are random numbers, none of them zero.
    """
    model, rng = MMCORE(config.model, config.execution), np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), packing.placeholder(config)))["params"]
    checkpoints = Checkpoints(workdir, config)
    for step in steps or (config.total_steps,):
        params = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
        state = State(np.int32(step), {}, {}, flatten_dict(params, sep="/"))
        statistics = {"seen": np.float32(step)} if steps else {}
        checkpoints.save(state, Constants({}, statistics), step, {})
    checkpoints.wait()
    (workdir / "config.json").write_text(config.to_json())
    keep_tokenizer(config.data.tokenizer, workdir / "tokenizer")
    return workdir


def logged(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The logged metrics that are a function of the run alone."""
    measured = ("examples_per_second", "step_seconds", "goodput/")
    return [{k: v for k, v in record.items() if not k.startswith(measured)} for record in read_metrics(workdir)]


# PyTorch takes seconds to import, and whoever finds it installed imports it; users of ours need not have it.
_WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "


def command(door: str, *arguments: object) -> list[str]:
    """The command line of a door in a process of its own."""
    run = f"{_WITHOUT_TORCH}from mmcore_jax import {door}; {door}.main()"
    return [sys.executable, "-c", run, *map(str, arguments)]


def start(command: list[str], count: int, devices: int, output: pathlib.Path) -> list[subprocess.Popen]:
    """Starts `count` processes that know of each other, each of `devices` devices; what they print is in `OUTPUT.I`."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags, started = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}", []
    for index in range(count):
        environment = {**os.environ, "XLA_FLAGS": flags}
        if count > 1:
            environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
            environment |= {"JAX_PROCESS_ID": str(index)}
        with open(f"{output}.{index}", "w") as file:
            started.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=file))
    return started


# Others are forked from a process that has imported everything, which takes seconds, and has done nothing.
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload([__name__])


def fork(function: Callable[..., Any], *arguments: object, output: pathlib.Path, devices: int = 1) -> BaseProcess:
    """Starts a function of a module of tests in a process of its own, which emulates that many devices.

    What it prints goes into `output`, and at the end what it returns, as JSON. The module must not need PyTorch.
    """
    process = _FORKED.Process(target=_run, args=(function, arguments, output, devices))
    process.start()
    return process


def _run(function: Callable[..., Any], arguments: tuple, output: pathlib.Path, devices: int) -> None:
    sys.modules["torch"] = None
    jax.config.update("jax_num_cpu_devices", devices)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    print(json.dumps(function(*arguments)))


def call(function: Callable[..., Any], *arguments: object, devices: int) -> Any:
    """What a function returns, through JSON, in a process of its own as `fork` starts it."""
    with tempfile.NamedTemporaryFile("r") as output:
        process = fork(function, *arguments, output=output.name, devices=devices)
        process.join()
        said = output.read()
    assert process.exitcode == 0, said[-3000:]
    return json.loads(said.splitlines()[-1])
