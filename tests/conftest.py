"""Tests run on the CPU, and share one cache of compiled programs, their subprocesses included."""

import gc
import os
import pathlib
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="mmcore_jax_tests_")  # until this process ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Tests compile hundreds of programs that then run for a moment: quick compilation counts, not quick programs.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

# Tracing makes millions of small objects that live on: looking for garbage among them takes a twentieth of the time.
gc.set_threshold(100_000, 50, 50)

LONGEST = ("test_mesh.py", "test_processes.py", "test_resume.py")


def pytest_collection_modifyitems(items: list) -> None:
    """Puts the longest first, so that they do not run alone at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> pathlib.Path:
    """The tiny dataset, with an index that grows as it is read; nothing else in it changes."""
    from tests import tiny

    return tiny.write_dataset(tmp_path_factory.mktemp("data"))
