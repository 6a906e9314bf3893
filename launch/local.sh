#!/usr/bin/env bash
# Trains on this machine: in one process, which takes all its GPUs, or in several, as many machines would.
#
#     bash launch/local.sh [OPTIONS] -- --config=configs/stage2.py:RECIPE [ARGUMENTS OF TRAIN]
#
# --processes N  (default 1) of which each has one GPU
# --devices N    emulated by each process, on CPU
# --extras NAME  of setup.py (default: cuda where there is a GPU, else openmoji)
# --attempts N   starts in all (default 100)
# --dry-run      prints what it would do
#
# When a process dies, the others are ended, and all start again where the run stood.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

processes=1 devices='' extras=openmoji grace=${MMCORE_JAX_GRACE_SECONDS:-60}
if command -v nvidia-smi >/dev/null; then extras=cuda; fi
while (($#)); do
  case $1 in
    --processes) need "$@" && processes=$2 && shift ;;
    --devices) need "$@" && devices=$2 && shift ;;
    --extras) need "$@" && extras=$2 && shift ;;
    --attempts) need "$@" && attempts=$2 && shift ;;
    --dry-run) dry_run=true ;;
    --help) usage && exit ;;
    --) shift && break ;;
    *) fail "unknown argument $1; see bash $0 --help." ;;
  esac
  shift
done
(($#)) || fail "nothing to train: put -- and the arguments of train at the end."

if ! $dry_run; then
  # shellcheck source=launch/environment.sh
  source launch/environment.sh "$extras"
fi
[[ -z $devices ]] || export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

running=() stopping=false
stop() {
  stopping=true
  kill -TERM "${running[@]}" 2>/dev/null || true
}
trap stop TERM INT

free_port() {
  python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
}

attempt() { # TRAIN-ARGUMENTS: one start of all processes; the exit code is that of the first to fail
  local variables=() command index port=PORT code=0 worst=0 ended killer=''
  if $stopping; then
    exit "$stopped"
  fi
  $dry_run || ((processes == 1)) || port=$(free_port)
  running=()
  for ((index = 0; index < processes; index++)); do
    if ((processes > 1)); then
      variables=("JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$index")
      [[ $extras != *cuda* ]] || variables+=("JAX_LOCAL_DEVICE_IDS=$index")
    fi
    command=(env "${variables[@]}" python -m mmcore_jax.train --stopped_code="$stopped" "$@")
    echo "+ $(quoted "${command[@]}")"
    if ! $dry_run; then
      "${command[@]}" &
      running+=($!)
    fi
  done
  while ((${#running[@]})); do
    code=0
    wait -n -p ended "${running[@]}" || code=$?
    [[ -n ${ended:-} ]] || continue # a signal came
    mapfile -t running < <(printf '%s\n' "${running[@]}" | grep -vx "$ended")
    if ((code && ! worst)); then
      worst=$code
      (sleep "$grace" && kill -KILL "${running[@]}") >/dev/null 2>&1 & # they wait for the one that is gone
      killer=$!
    fi
  done
  [[ -z $killer ]] || kill "$killer" 2>/dev/null || true
  if $stopping; then
    exit "$worst"
  fi
  return "$worst"
}

until_done attempt "$@"
