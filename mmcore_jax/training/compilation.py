"""Compiled programs are kept, so that a restart reaches its first step without compiling."""

import hashlib
import pathlib
import platform

import jax


def keep_programs(directory: str | None, workdir: pathlib.Path) -> None:
    """Turns on JAX's persistent compilation cache, unless the environment (JAX_COMPILATION_CACHE_DIR) has already.

    Args:
      directory: in the workdir unless it is absolute or a URL; None keeps nothing.
      workdir: of the run.
    """
    if directory is None or jax.config.jax_compilation_cache_dir:
        return
    path = directory if "://" in directory else str(workdir / directory)
    # XLA does not look at the instruction set when it finds a program for CPUs, which would end with an illegal one.
    if jax.default_backend() == "cpu":
        path += f"/{_instruction_set()}"
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _instruction_set() -> str:
    """Stands for the instructions that this CPU has, as far as Linux says."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
