"""How the step is compiled, and that compiled programs are kept: a restart reaches its first step without compiling."""

import hashlib
import os
import pathlib
import platform
from collections.abc import Callable

import jax
from jax.sharding import Mesh

# Options of XLA for the step, by platform or kind of device, each with its reason. What XLA_FLAGS or LIBTPU_INIT_ARGS
# say counts more.
OPTIONS: dict[str, dict[str, bool | int]] = {
    "tpu": {
        # Gradients of several slices are summed over the data-centre network: without these two, after the backward
        # pass and not beside it.
        "xla_tpu_enable_data_parallel_all_reduce_opt": True,
        "xla_tpu_data_parallel_opt_different_sized_ops": True,
    },
    "TPU v5 lite": {  # the compiler refuses them for others
        # Gradients are scattered over the chips of a group while the next products run, not between them.
        "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": True,
        "xla_enable_async_reduce_scatter_fusion": True,
        # Products that do so need more than the 16 MiB of fast memory that is their limit otherwise.
        "xla_tpu_scoped_vmem_limit_kib": 32 << 10,
    },
    # Parameters of the next layer are gathered while this one computes.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}


def compiled_step(step: Callable, mesh: Mesh) -> Callable:
    """The step as it runs: compiled, with the state given away. `plan` compiles the same ahead of time."""
    return jax.jit(step, donate_argnums=0, compiler_options=_options(mesh.devices.flat[0]) or None)


def _options(device: jax.Device) -> dict[str, bool | int]:
    given = os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", "")
    options = OPTIONS.get(device.platform, {}) | OPTIONS.get(device.device_kind, {})
    return {name: value for name, value in options.items() if f"--{name}=" not in given}


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
