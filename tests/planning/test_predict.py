"""The prediction, on stored modules whose times follow by hand."""

import dataclasses
import pathlib

import numpy as np
import pytest

from mmcore_jax.planning import hlo
from mmcore_jax.planning.hlo import Collective
from mmcore_jax.planning.predict import CHIPS, GIB, Chip, Links, predict

MODULES = pathlib.Path(__file__).parent / "modules"
V5E, V5P, PEAK = CHIPS["TPU v5 lite"], CHIPS["TPU v5"], 197e12


def wired(*shape: int, slices: int = 1, chip: Chip = V5E) -> Links:
    """Chips in a grid, in the order of their coordinates."""
    return Links(chip, PEAK, np.array([(n, *place) for n in range(slices) for place in np.ndindex(*shape)]))


def module(name: str) -> hlo.Module:
    return hlo.parse((MODULES / name).read_text())


def test_loops_count_as_often_as_they_run():
    found = predict(module("loop.txt"), {"data": 1}, wired(1, 1))
    assert found.cycles == 5 * 700
    assert found.flops == 5 * 2 * 8 * 16 * 32
    assert found.kinds["matrix products"] == pytest.approx(5 * 0.85 * 700 / 1.5e9)


def test_what_compute_hides_is_not_exposed():
    mesh, links = {"fsdp": 4}, wired(2, 2)
    found = predict(module("overlap.txt"), mesh, links)
    gathered, scattered = (found.transfers[kind, ("fsdp",)] for kind in ("all-gather", "reduce-scatter"))
    # 32 MiB to four chips in a square without rings: 3/4 of it at 90% of 100 GB/s, and two hops.
    assert gathered.seconds == pytest.approx(0.75 * 2**25 / (0.9 * 100e9) + 2e-6)
    assert (gathered.bytes, scattered.bytes) == (2**25, 2**25)
    # A product takes the larger of its estimate and its FLOPs: the first hides the gathering; nothing hides the end.
    first, second = 2 * 4096**3 / (0.95 * PEAK), 2 * 4096**3 / (0.95 * PEAK)
    assert first > gathered.seconds
    assert gathered.exposed == 0
    assert scattered.exposed == pytest.approx(scattered.seconds)
    assert found.seconds == pytest.approx(first + second + scattered.seconds)


def test_what_compute_does_not_hide_is_waited_for():
    slow = dataclasses.replace(V5E, links=V5E.links / 10)
    found = predict(module("overlap.txt"), {"fsdp": 4}, dataclasses.replace(wired(2, 2), chip=slow))
    gathered = found.transfers["all-gather", ("fsdp",)]
    assert gathered.exposed == pytest.approx(gathered.seconds - 2 * 4096**3 / (0.95 * PEAK))


@pytest.mark.parametrize("reduced", ["first", "x"])
def test_each_of_two_transfers_is_waited_for(reduced):
    """Also where what the second one moves was made beside the first, which a fusion hands on."""
    text = (MODULES / "two_transfers.txt").read_text().replace("start(%first)", f"start(%{reduced})")
    found = predict(hlo.parse(text), {"fsdp": 4}, wired(2, 2))
    gathered, summed = (found.transfers[kind, ("fsdp",)] for kind in ("all-gather", "all-reduce"))
    assert gathered.exposed == 0
    assert summed.exposed == pytest.approx(summed.seconds) == pytest.approx(1.5 * 2**25 / (0.9 * 100e9) + 2e-6)
    assert found.seconds == pytest.approx(3 * 2 * 4096**3 / (0.95 * PEAK) + summed.exposed)


def test_between_slices_hosts_send_and_receive():
    """In a queue of its own: what the links do beside it takes no time from it."""
    found = predict(module("slices.txt"), {"data": 2, "fsdp": 4}, wired(2, 2, slices=2))
    inside, between = (found.transfers["all-reduce", (axis,)] for axis in ("fsdp", "data"))
    product = 2 * 4096**3 / (0.95 * PEAK)
    assert (between.count, between.bytes) == (1, 2**25)
    assert between.seconds == pytest.approx(2**25 / (0.9 * V5E.network))  # to the other slice a half, and a half back
    assert between.exposed == pytest.approx(between.seconds - inside.seconds - product)
    assert found.seconds == pytest.approx(between.seconds + product)


def test_products_of_a_library_are_named():
    text = (MODULES / "two_transfers.txt").read_text()
    call = 'custom-call(%reduced, %gathered), custom_call_target="__cublas$gemm"'
    text = text.replace("fusion(%reduced, %gathered), kind=kOutput, calls=%product", call)
    assert predict(hlo.parse(text), {"fsdp": 4}, None).kernels == {"__cublas": 1}


def test_without_links_nothing_is_timed():
    found = predict(module("overlap.txt"), {"fsdp": 4}, None)
    assert found.seconds == 0
    assert found.flops == 2 * 2 * 4096**3
    assert found.transfers["all-gather", ("fsdp",)].bytes == 2**25


@pytest.mark.parametrize(
    ("kind", "group", "places", "bandwidth", "share"),
    [
        ("all-gather", range(256), wired(16, 16), 200e9, 255 / 256),  # both rings
        ("all-gather", range(16), wired(16, 16), 100e9, 15 / 16),  # one ring
        ("all-gather", range(8), wired(16, 16), 50e9, 7 / 8),  # half of a ring is a line
        ("all-reduce", range(16), wired(16, 16), 100e9, 2 * 15 / 16),
        ("all-reduce", range(0, 16, 4), wired(16, 16), 25e9, 2 * 3 / 4),  # a ring with four groups on its links
        ("all-reduce", (0, 4), wired(8, 8), 12.5e9, 1),  # a line with four groups
        ("all-reduce", (0, 1), wired(8, 8), 50e9, 1),
        ("all-to-all", range(16), wired(16, 16), 100e9, 4),
        ("all-to-all", range(256), wired(16, 16), 100e9, 4),  # both rings at once, each as far as alone
        ("collective-permute", (0, 1), wired(16, 16), 50e9, 1),  # one direction of a link
        ("all-gather", range(64), wired(4, 4, 4, chip=V5P), 600e9, 63 / 64),
        ("all-gather", range(32), wired(2, 4, 4, chip=V5P), 300e9, 31 / 32),  # no cube: three lines
        ("all-reduce", (0, 4), wired(2, 2, slices=2), 3.125e9, 1),  # over the network between slices
        ("all-to-all", range(8), wired(2, 2, slices=2), 3.125e9, 1 / 2 + 3.125 / 50),  # half of what each chip has
    ],
)
def test_how_long_a_transfer_takes(kind, group, places, bandwidth, share):
    found = places.seconds(Collective(kind, GIB, tuple(group)))
    assert found == pytest.approx(share * GIB / (0.9 * bandwidth), rel=5e-3)
