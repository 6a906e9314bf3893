# Enters the repository's root and activates .venv, made and filled first where needed. To be sourced:
#
#     source launch/environment.sh EXTRAS        for example: test
#
# PYTHON names the interpreter to make it with (default: python3). Nothing is installed twice: a stamp in .venv says
# what was installed, and from which setup.py.
# shellcheck shell=bash

extras=$1
cd -P "$(dirname "${BASH_SOURCE[0]}")/.." || exit

if ! grep -qsF "$PWD/.venv" .venv/bin/activate; then
  python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    found=$("$python" --version 2>&1) || found="not found"
    echo "error: Python 3.11 or later is needed, $python is $found: install one and set PYTHON to its path." >&2
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
  python -m pip install --quiet --quiet --disable-pip-version-check --editable ".[$extras]"
  echo "$wanted" >"$stamp"
fi

# shellcheck source=launch/flags.sh
source launch/flags.sh "$extras"
