"""Tests run on the CPU, and share one cache of compiled programs, their subprocesses included."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="mmcore_jax_tests_"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Tests compile hundreds of programs that then run for a moment: quick compilation counts, not quick programs.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

LONGEST = ("test_mesh.py", "test_processes.py", "test_resume.py")


def pytest_collection_modifyitems(items: list) -> None:
    """Puts the longest first, so that they do not run alone at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
