#!/usr/bin/env bash
# Trains on this host as one of many, until the run is done or SIGTERM comes. The other scripts start it.
#
#     bash launch/host.sh EXTRAS [ARGUMENTS OF TRAIN]
set -euo pipefail

extras=$1
shift
if [[ -n ${MMCORE_JAX_IMAGE:-} ]]; then # everything is installed
  # shellcheck source=launch/flags.sh
  source "$(dirname "${BASH_SOURCE[0]}")/flags.sh" "$extras"
else
  fetch_python=true # TPU VMs come with Python 3.10
  # shellcheck source=launch/environment.sh
  source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "$extras"
fi
exec python -m mmcore_jax.train --stopped_code=75 "$@"
