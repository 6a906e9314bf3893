#!/usr/bin/env bash
# The job that `slurm.sh` submits, on its first node: slurm_job.sh ATTEMPTS DIRECTORY [ARGUMENTS OF TRAIN]
set -euo pipefail

attempts=$1
cd "$2" # SLURM runs a copy of this file
shift 2
# shellcheck source=launch/environment.sh
source launch/environment.sh cuda

# Since SLURM 22.05 srun does not take this from the job.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
code=0
srun --kill-on-bad-exit=1 python -m mmcore_jax.train --stopped_code=75 "$@" || code=$?
if ((code == 0 || code == 2)); then
  exit "$code"
fi
start=$((${SLURM_RESTART_COUNT:-0} + 1))
echo "start $start of $attempts ended with exit code $code" >&2
if ((start >= attempts)); then
  exit "$code"
fi
scontrol requeue "$SLURM_JOB_ID"
