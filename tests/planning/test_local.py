"""The real step of small stages, compiled for eight emulated devices: placed as intended, and only expected traffic."""

import pathlib

import pytest

from tests import tiny

MESHES = {"data": (8, 1, 1, 1), "fsdp": (1, 8, 1, 1), "tensor": (1, 4, 1, 2)}


def outcomes(stage: str) -> dict[str, dict]:
    """What `plan` records of a stage on each mesh. Runs where eight devices are."""
    from mmcore_jax.planning.outcome import evaluate

    found = {}
    for name, sizes in MESHES.items():
        mesh = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "context", "tensor"), sizes)]
        found[name] = evaluate(tiny.config(stage, pathlib.Path("nowhere"), *mesh), "local").record()
    return found


@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2"])
def test_golden(stage: str) -> None:
    found = tiny.call(outcomes, stage, devices=8)
    for name, outcome in found.items():
        print(name, outcome["memory"], outcome["transfers"], outcome["compiled_flops"], outcome["model_flops"])
    raise AssertionError
