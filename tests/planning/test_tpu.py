"""The real step through the compiler for TPUs, where that is installed: no TPU is needed."""

import importlib.util
import pathlib

import pytest

from mmcore_jax.config import UserError
from mmcore_jax.planning import process
from tests import tiny

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed: pip install 'mmcore_jax[tpu]'",
)


@pytest.fixture(autouse=True)
def _optimised(monkeypatch):
    """As users compile: other tests take quick compilation over quick programs."""
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")


def plan(*overrides: str, topology: str = "v5e:2x2", slices: int = 1):
    """Plans a diffusion transformer that is wide enough for its gradients to be scattered."""
    sizes = [f"--config.model.dit.{name}" for name in ("width=256", "heads=4", "context_width=256")]
    config = tiny.config("stage2", pathlib.Path("nowhere"), *sizes, *overrides)
    return process.run(config, topology, slices, "test")


def test_a_step_on_four_chips():
    outcome = plan("--config.mesh.data=1", "--config.mesh.fsdp=4")
    assert outcome.fits
    assert outcome.chips == 4
    assert outcome.seconds > outcome.kinds["matrix products"] > 0
    assert outcome.cycles > 0
    moved = {transfer.kind: transfer.bytes for transfer in outcome.transfers}
    assert {transfer.axes for transfer in outcome.transfers} == {"fsdp"}
    assert moved.keys() == {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}
    assert moved["reduce-scatter"] > 5 * (moved["all-reduce"] + moved["all-to-all"])  # the gradients are
    assert all(large.where.startswith("mmcore_jax/") for large in outcome.temporaries[:3])


def test_slices_are_split_along_data():
    """Each chip sends the other slice its part of the gradients, scattered before."""
    outcome = plan("--config.mesh.data=2", "--config.mesh.fsdp=4", topology="v6e:2x2", slices=2)
    assert outcome.chips == 8
    moved = {(transfer.kind, transfer.axes): transfer.bytes for transfer in outcome.transfers}
    assert {axes for _, axes in moved} == {"fsdp", "data"}
    assert moved["reduce-scatter", "fsdp"] / 4 < moved["all-reduce", "data"] < moved["reduce-scatter", "fsdp"] / 2


def test_out_of_memory_is_a_result():
    settings = "--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.batch_size=8000000"
    outcome = plan(*settings, topology="v5p:2x2x1")
    assert not outcome.fits
    assert outcome.needed > outcome.capacity > 95 * 2**30
    assert any("accumulation" in change for change in outcome.advice)


def test_an_unknown_topology():
    with pytest.raises(UserError, match="v5e:3x77"):
        plan(topology="v5e:3x77")
