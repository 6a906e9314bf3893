"""Peak memory of loading a synthetic sharded SigLIP, beyond that of the process before.

python -m tests.pretrained.memory --gigabytes 4
"""

import argparse
import json
import pathlib
import tempfile
import time

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from mmcore_jax import pretrained
from mmcore_jax.config import Siglip, SiglipVision
from mmcore_jax.pretrained import files, siglip, table
from mmcore_jax.pretrained.model import abstract_params

PARTS = 24  # layers
BYTES = 2


def write_checkpoint(directory: pathlib.Path, gigabytes: float) -> int:
    """Writes a sharded bfloat16 checkpoint of about that size, one tensor in memory at a time; returns its bytes."""
    width = 64 * int((gigabytes * 1e9 / BYTES / (12 * PARTS)) ** 0.5 / 64)
    config = Siglip(SiglipVision(width, PARTS, width // 64, 4 * width, image_size=224, patch_size=14))
    shapes = flatten_dict(abstract_params(siglip.FAMILY, config), sep="/")
    dtype = files.DTYPES["BF16"]
    specs = [
        files.Spec(name, dtype, table.exported_shape(entry, shapes))
        for entry in siglip.entries(config)
        for name in entry.names
    ]
    total = sum(spec.bytes for spec in specs)
    files.write_json(directory / "config.json", siglip.write_config(config, "bfloat16"))
    files.write_tensors(directory, "model", specs, (np.ones(spec.shape, dtype) for spec in specs), total // 6)
    return total


def measure(gigabytes: float) -> dict[str, float]:
    """Loads in this process; returns sizes in bytes, and seconds."""
    with tempfile.TemporaryDirectory() as directory:
        size = write_checkpoint(pathlib.Path(directory), gigabytes)
        jax.block_until_ready(jax.numpy.zeros(1))
        before, start = _memory("VmRSS"), time.monotonic()
        loaded = pretrained.load(directory)
        seconds = time.monotonic() - start
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params)) == size
        return {"checkpoint": size, "peak": _memory("VmHWM") - before, "seconds": seconds, "before": before}


def _memory(field: str) -> int:
    """Of Linux; `getrusage` would count the peak of the process that started this one."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    print(json.dumps(measure(parser.parse_args().gigabytes)))
