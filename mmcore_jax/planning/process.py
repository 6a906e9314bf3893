"""Evaluates a recipe in a process and an environment of its own: the compiler for TPUs disturbs nothing else."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from mmcore_jax import config as config_lib
from mmcore_jax.config import Config, UserError, door
from mmcore_jax.planning.outcome import Outcome, evaluate
from mmcore_jax.planning.program import LOCAL

# No TPU is looked for, other processes may compile for TPUs at the same time, and no flags of another backend come in,
# of which the compiler for TPUs would die.
TPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "XLA_FLAGS": "",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
_SECONDS_BETWEEN_LINES = 30


def run(config: Config, topology: str, slices: int, label: str) -> Outcome:
    """What `evaluate` returns; says on stderr that it is still at work.

    Raises:
      UserError: if the compiler for TPUs is not installed or dies, and whatever `evaluate` raises.
    """
    environment = dict(os.environ)
    if topology != LOCAL:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"--topology={topology} needs libtpu, the compiler for TPUs: pip install 'mmcore_jax[tpu]', or take "
                f"--topology={LOCAL}."
            )
        environment |= TPU_ENVIRONMENT
    with tempfile.TemporaryDirectory() as directory:
        request, reply = pathlib.Path(directory, "request.json"), pathlib.Path(directory, "reply.json")
        settings = {"config": dataclasses.asdict(config), "topology": topology, "slices": slices}
        request.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "mmcore_jax.planning.process", str(request), str(reply)]
        with open(pathlib.Path(directory, "errors"), "w+", encoding="utf-8", errors="replace") as errors:
            process = subprocess.Popen(command, env=environment, stdout=errors, stderr=errors)
            _wait(process, label)
            errors.seek(0)
            lines = errors.read().splitlines()
        if process.returncode:
            raise UserError(_reason(process.returncode, lines))
        return Outcome.from_dict(json.loads(reply.read_text()))


def _wait(process: subprocess.Popen, label: str) -> None:
    begin = time.monotonic()
    try:
        while True:
            try:
                process.wait(_SECONDS_BETWEEN_LINES)
                return
            except subprocess.TimeoutExpired:
                print(f"{label}: compiling for {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    finally:
        process.kill()


def _reason(code: int, lines: Sequence[str]) -> str:
    told = [line.removeprefix("error: ").rstrip(".") for line in lines if line.startswith("error: ")]
    if told:
        return f"{told[-1]}."
    ending = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return f"the compiler ended {ending}; the last it said is: {' | '.join(lines[-3:])}"


@door
def main(argv: Sequence[str]) -> None:
    """Reads a request, evaluates it, and writes the reply."""
    request, reply = map(pathlib.Path, argv)
    settings = json.loads(request.read_text())
    config = config_lib.from_dict(Config, settings["config"], "config", request)
    reply.write_text(json.dumps(dataclasses.asdict(evaluate(config, settings["topology"], settings["slices"]))))


if __name__ == "__main__":
    main()
