#!/usr/bin/env bash
# Lint and tests, on CPU, in an environment that it makes itself.
#
#     bash launch/test.sh [PYTEST ARGUMENTS]      for example: tests/nn -k leak -x
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test

ruff check --quiet
ruff format --check --quiet
python -m pytest -n auto --dist worksteal "$@"
