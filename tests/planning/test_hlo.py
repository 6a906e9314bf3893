"""The reader of compiled modules: on lines in every form that compilers print, and on stored modules."""

import pathlib

import pytest

from mmcore_jax.planning import hlo

MODULES = pathlib.Path(__file__).parent / "modules"
LOOP = (MODULES / "loop.txt").read_text()


@pytest.fixture(scope="module")
def loop() -> hlo.Module:
    return hlo.parse(LOOP)


def test_a_loop_runs_as_often_as_its_condition_says(loop):
    times = {line.name: times for _, line, times in hlo.executed(loop)}
    assert times["while"] == 1
    assert times["product"] == 5
    known = LOOP.replace("body=%body\n", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}\n')
    assert {line.name: times for _, line, times in hlo.executed(hlo.parse(known))}["product"] == 7


def test_what_a_fusion_computes_and_moves(loop):
    product = loop.computations["body"]["product"]
    assert product.cycles == 700
    assert hlo.flops(loop, "body", product) == 2 * 8 * 16 * 32
    # One slice of the five, padded to tiles of 8 x 128, its number, and the result; fast memory costs nothing.
    assert hlo.traffic(loop, "body", product) == 4 * (16 * 128 + 1 + 8 * 128)


def test_the_line_of_ours_that_made_it(loop):
    assert hlo.source(loop, loop.computations["body"]["product"], "mmcore_jax") == "mmcore_jax/nn/layers.py:20"
    older = LOOP.replace("stack_frame_id=3", 'source_file="/here/mmcore_jax/mmcore.py" source_line=7')
    module = hlo.parse(older)
    assert hlo.source(module, module.computations["body"]["product"], "mmcore_jax") == "mmcore_jax/mmcore.py:7"


def test_text_without_an_entry():
    with pytest.raises(ValueError, match="no entry"):
        hlo.parse("HloModule nothing")


@pytest.mark.parametrize(
    ("kind", "size", "space"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096, 0),
        ("bf16[3,64,96]{2,1,0:T(8,128)(2,1)S(1)}", 2 * 3 * 64 * 128, 1),
        ("bf16[3,64,96]{1,2,0:T(8,128)(2,1)}", 2 * 3 * 96 * 128, 0),
        ("pred[]{:T(512)}", 1, 0),
        ("f8e4m3fn[4,4]{1,0}", 16, 0),
        ("s4[4,4]", 8, 0),
    ],
)
def test_bytes_of_an_array(kind, size, space):
    module = hlo.parse(f"ENTRY %main (p: f32[]) -> f32[] {{\n  ROOT %p = {kind} parameter(0)\n}}\n")
    (array,) = module.computations["main"]["p"].arrays
    assert (array.bytes, array.space) == (size, space)


MESH = {"data": 2, "fsdp": 4, "context": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}", ("fsdp",)),
        ("replica_groups={{0,8},{1,9}}", ("data",)),
        ("replica_groups={}", ("data", "fsdp", "tensor")),
        ("replica_groups=[8,2]<=[16]", ("tensor",)),
        ("replica_groups=[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'b'}", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'a','b'}", ("data", "fsdp")),
        ("replica_groups=mesh['a'=16] {'a':(8)2}", ("tensor",)),
        ("replica_groups=mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'b'}", ("data",)),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0}}", ("fsdp",)),
    ],
)
def test_mesh_axes_of_a_collective(groups, axes):
    text = (
        "ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n"
        f"  ROOT %moved = f32[8]{{0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add\n}}\n"
    )
    module = hlo.parse(text)
    found = hlo.collective(module, "main", module.computations["main"]["moved"])
    assert hlo.axes(found.group, MESH) == axes
    assert found.bytes == 32


@pytest.mark.parametrize(
    ("left", "right", "result", "rest", "flops"),
    [
        ("8,16", "16,32", "8,32", "dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
        # A batch of three products, as a window in which only three places count.
        (
            "3,8,16",
            "3,16,32",
            "3,8,32",
            "window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
            2 * 3 * 8 * 16 * 32,
        ),
        # 3 x 3 over 8 x 8 with borders: 22 of 24 places along each side.
        (
            "2,8,8,4",
            "3,3,4,6",
            "2,8,8,6",
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            2 * 2 * 4 * 6 * 22 * 22,
        ),
    ],
)
def test_flops_of_a_convolution(left, right, result, rest, flops):
    text = (
        "ENTRY %main (a: f32[], b: f32[]) -> f32[] {\n"
        f"  %a = f32[{left}] parameter(0)\n  %b = f32[{right}] parameter(1)\n"
        f"  ROOT %c = f32[{result}] convolution(%a, %b), {rest}\n}}\n"
    )
    module = hlo.parse(text)
    assert hlo.flops(module, "main", module.computations["main"]["c"]) == flops
