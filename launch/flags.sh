# Settings of the runtimes, each with its reason: `flags.sh EXTRAS`. To be sourced; what is set already stays.
# Those of the compiler are in mmcore_jax/training/compilation.py, where `plan` takes them from, too.
# shellcheck shell=bash

# XLA on CPU takes and gives back its working memory at every step. With huge pages that costs 25 times fewer page faults,
# and a step of the embedded recipe takes a quarter less time.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

if [[ ,$1, == *,cuda,* ]]; then
  # Nothing else runs on the GPUs of a training job; JAX would take three quarters of their memory.
  if [[ -z ${XLA_PYTHON_CLIENT_MEM_FRACTION:-} ]]; then # its former name; JAX takes one of them only
    export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-0.92}"
  fi
fi
