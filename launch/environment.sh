# Enters the repository's root and activates .venv, made and filled first where needed. To be sourced:
#
#     source launch/environment.sh EXTRAS        for example: test
#
# PYTHON names the interpreter to make it with (default: the first of python3, python3.13, python3.12 and python3.11 that
# is new enough; with `fetch_python=true` one is fetched where none is). Nothing is installed twice: a stamp in .venv says
# what was installed, and from which setup.py.
# shellcheck shell=bash

extras=$1
cd -P "$(dirname "${BASH_SOURCE[0]}")/.." || exit

new_enough() { # PYTHON
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if ! grep -qsF "$PWD/.venv" .venv/bin/activate; then
  pythons=(python3 python3.13 python3.12 python3.11)
  [[ -z ${PYTHON:-} ]] || pythons=("$PYTHON")
  for python in "${pythons[@]}"; do
    if new_enough "$python"; then break; fi
  done
  if [[ -z ${PYTHON:-} ]] && ${fetch_python:-false} && ! new_enough "$python"; then
    python3 -m pip install --quiet --user uv && python3 -m uv python install --quiet 3.12 || exit 1
    python=$(python3 -m uv python find 3.12) || exit 1
  fi
  if ! new_enough "$python"; then
    found=$("${pythons[0]}" --version 2>&1) || found="not found"
    echo "error: Python 3.11 or later is needed, ${pythons[0]} is $found: install one and set PYTHON to its path." >&2
    exit 2
  fi
  if [[ -L .venv ]]; then
    echo "error: .venv is a link to $(readlink .venv), which would be emptied: remove the link, not what it leads to." >&2
    exit 2
  fi
  "$python" -m venv --clear .venv
fi
# shellcheck source=/dev/null
source .venv/bin/activate

wanted=$(cksum <setup.py)
stamp=".venv/installed-$extras"
if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
  echo "installing mmcore_jax[$extras] into $PWD/.venv (once, a minute or two)"
  # Whatever pip ends with, it is not a mistake of the user.
  python -m pip install --quiet --quiet --disable-pip-version-check --editable ".[$extras]" || exit 1
  echo "$wanted" >"$stamp"
fi

# shellcheck source=launch/flags.sh
source launch/flags.sh "$extras"
