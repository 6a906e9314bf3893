# What the scripts that launch training share. To be sourced, with the script's arguments: it sets `dry_run`.
#
# A run that is started again continues where it stood, so that "once more" is the answer to everything but a mistake of
# the user (exit code 2). Train ends with $stopped where SIGTERM has stopped it before its last step.
# shellcheck shell=bash disable=SC2034

stopped=75
attempts=100 pause=${MMCORE_JAX_RETRY_SECONDS:-60} dry_run=false
script=$(realpath "$0")
cd -P "$(dirname "${BASH_SOURCE[0]}")/.." || exit

fail() {
  echo "error: $*" >&2
  exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || fail "bash 5.1 or later is needed, this is $BASH_VERSION."

usage() { # of the script: its first comment
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"
}

need() { # FLAG VALUE ...: the flag has a value
  [[ -n ${2:-} && $2 != --* ]] || fail "$1 needs a value; see bash $0 --help."
}

quoted() { # WORD...: as one would type them
  local word words=()
  for word; do
    [[ $word =~ ^[a-zA-Z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}

run() { # COMMAND...: shows and does it; with --dry-run only the former
  echo "+ $(quoted "$@")"
  $dry_run || "$@"
}

until_done() { # COMMAND...: up to $attempts times
  local attempt code
  for ((attempt = 1; attempt <= attempts; attempt++)); do
    code=0
    "$@" || code=$?
    if ((code == 0 || code == 2)) || $dry_run; then
      return "$code"
    fi
    echo "attempt $attempt of $attempts ended with exit code $code" >&2
    ((attempt == attempts)) || sleep "$pause"
  done
  return "$code"
}
