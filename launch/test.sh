#!/usr/bin/env bash
# Lint and unit tests, on CPU, in an environment that it makes itself.
#
#     bash launch/test.sh [PYTEST ARGUMENTS]      for example: tests/nn -k leak -x
#     bash launch/test.sh -m whole_runs           the others, which train, kill and resume whole runs
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test

ruff check --quiet
ruff format --check --quiet
python -m pytest -n auto --dist worksteal "$@"
