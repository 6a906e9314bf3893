"""Where parameters go: on eight emulated devices, in a process of their own; and how much memory that takes."""

from tests import tiny
from tests.pretrained import memory

MESHES = {"fsdp": (1, 8, 1, 1), "mixed": (1, 2, 2, 2), "data": (8, 1, 1, 1)}


def compare_placements(directory: str) -> dict[str, int]:
    """Loads onto every mesh; returns how many parameters are sharded. Runs where eight devices are."""
    import jax
    import numpy as np

    from mmcore_jax import config, pretrained, sharding

    whole = jax.tree.leaves(pretrained.load(directory).params)
    sharded = {}
    for name, sizes in MESHES.items():
        mesh = sharding.make_mesh(config.Mesh(*sizes))
        leaves = jax.tree.leaves(pretrained.load(directory, mesh).params)
        for leaf, expected in zip(leaves, whole, strict=True):
            np.testing.assert_array_equal(leaf, expected)
            assert len(leaf.sharding.device_set) == 8
        sharded[name] = sum(not leaf.sharding.is_fully_replicated for leaf in leaves)
    return sharded


def test_every_mesh_gets_the_same_parameters(tmp_path):
    from tests.pretrained.originals import ORIGINALS

    for name in ("qwen_vl", "sd3.5 dual"):
        ORIGINALS[name]().save_pretrained(tmp_path / name, max_shard_size="40KB")
        sharded = tiny.call(compare_placements, str(tmp_path / name), devices=8)
        assert sharded.pop("data") == 0
        assert min(sharded.values()) > 5, sharded


def test_no_second_copy_in_memory(record_property):
    found = tiny.call(memory.measure, 0.3, devices=1)
    record_property("bytes", found)
    assert found["checkpoint"] > 250e6
    assert found["checkpoint"] <= 1.2 * found["peak"], "the measurement sees the parameters themselves"
    assert found["peak"] < 1.2 * found["checkpoint"]
