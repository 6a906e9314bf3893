#!/usr/bin/env bash
# Trains on GPUs of a SLURM cluster, a process each: submits a job that goes on until the run is done.
#
#     bash launch/slurm.sh --nodes N --gpus N [OPTIONS] -- --config=configs/stage2.py:RECIPE [ARGUMENTS OF TRAIN]
#
# --gpus N         of each node
# --cpus N         of each process, for the workers that read its data (default: what the cluster gives, often one)
# --time LIMIT     of one attempt, as sbatch reads it (default: that of the partition)
# --sbatch OPTION  any other of sbatch's, and again for more, for example --sbatch=--partition=batch
# --attempts N     starts in all (default 100)
# --dry-run        prints what it would do
#
# Five minutes before its time is over, and when it is preempted, a job saves and goes back into the queue; so it does
# when a node fails. This checkout must lie where all nodes see it.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes='' gpus='' others=()
while (($#)); do
  case $1 in
    --nodes) need "$@" && nodes=$2 && shift ;;
    --gpus) need "$@" && gpus=$2 && shift ;;
    --cpus) need "$@" && others+=(--cpus-per-task="$2") && shift ;;
    --time) need "$@" && others+=(--time="$2") && shift ;;
    --sbatch=*) others+=("${1#--sbatch=}") ;;
    --attempts) need "$@" && attempts=$2 && shift ;;
    --dry-run) dry_run=true ;;
    --help) usage && exit ;;
    --) shift && break ;;
    *) fail "unknown argument $1; see bash $0 --help." ;;
  esac
  shift
done
[[ -n $nodes && -n $gpus ]] || fail "--nodes and --gpus are needed."
(($#)) || fail "nothing to train: put -- and the arguments of train at the end."

# SIGTERM goes to the processes of train; the job itself lives on to go back into the queue.
run sbatch --job-name=mmcore_jax --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --requeue \
  --signal=TERM@300 --open-mode=append --output=slurm-%j.log "${others[@]}" launch/slurm_job.sh "$attempts" "$PWD" "$@"
