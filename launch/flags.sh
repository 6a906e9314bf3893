# Settings of the runtimes, each with its reason: `flags.sh EXTRAS`. To be sourced; what is set already stays.
# shellcheck shell=bash

add_flag() { # VARIABLE FLAG: unless the variable has it already, with whatever value
  [[ ${!1:-} == *"${2%%=*}"* ]] || export "$1=${!1:+${!1} }$2"
}

# XLA on CPU takes and gives back its working memory at every step. With huge pages that costs 25 times fewer page faults,
# and a step of the embedded recipe takes a quarter less time.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

case ,$1, in
  *,tpu,*)
    # Gradients of several slices are summed over the data-centre network: without these two, after the backward pass and
    # not beside it.
    add_flag LIBTPU_INIT_ARGS --xla_tpu_enable_data_parallel_all_reduce_opt=true
    add_flag LIBTPU_INIT_ARGS --xla_tpu_data_parallel_opt_different_sized_ops=true
    ;;
  *,cuda,*)
    # Parameters of the next layer are gathered while this one computes.
    add_flag XLA_FLAGS --xla_gpu_enable_latency_hiding_scheduler=true
    # Nothing else runs on the GPUs of a training job; JAX would take three quarters of their memory.
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
    ;;
esac
