#!/usr/bin/env bash
# Trains on a TPU slice of Google Cloud: creates it, copies this checkout onto its hosts, and trains until the run is done.
#
#     bash launch/tpu.sh --name NAME --zone ZONE --type TYPE [OPTIONS] -- --config=configs/stage2.py:RECIPE [...]
#
# --type TYPE      for example v5litepod-64, v5p-128, v6e-64
# --queued         as a queued resource, which waits until there is capacity
# --slices N       that many slices, as one queued resource
# --spot           cheaper, and may be taken away at any moment
# --project NAME   (default: that of gcloud)
# --version NAME   of the software of its hosts (default: the one for TYPE)
# --setup COMMAND  what each host does first, at every start, for example to mount the bucket that the workdir, the data
#                  and the checkpoints lie on: `data`, `runs` and `checkpoints` of this checkout are not copied
# --attempts N     starts in all (default 100)
# --delete         deletes the slice once the run is done; otherwise it stays, and is paid for
# --dry-run        prints what it would do, as if nothing were there yet
#
# A slice that was taken away is created again, and training continues from its newest checkpoint: `--workdir` must be on
# storage that outlives the slice. Needs gcloud, and a project that has TPUs.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name='' type='' slices=1 kind=tpu-vm version='' setup=true delete=false where=() capacity=()
while (($#)); do
  case $1 in
    --name) need "$@" && name=$2 && shift ;;
    --zone) need "$@" && where+=(--zone "$2") && shift ;;
    --project) need "$@" && where+=(--project "$2") && shift ;;
    --type) need "$@" && type=$2 && shift ;;
    --version) need "$@" && version=$2 && shift ;;
    --slices) need "$@" && slices=$2 && kind=queued-resources && shift ;;
    --setup) need "$@" && setup=$2 && shift ;;
    --attempts) need "$@" && attempts=$2 && shift ;;
    --queued) kind=queued-resources ;;
    --spot) capacity=(--spot) ;;
    --delete) delete=true ;;
    --dry-run) dry_run=true ;;
    --help) usage && exit ;;
    --) shift && break ;;
    *) fail "unknown argument $1; see bash $0 --help." ;;
  esac
  shift
done
[[ -n $name && -n $type && " ${where[*]} " == *" --zone "* ]] || fail "--name, --zone and --type are needed."
(($#)) || fail "nothing to train: put -- and the arguments of train at the end."
case $type in
  *[!a-z0-9-]*) fail "--type $type is no accelerator; see gcloud compute tpus accelerator-types list." ;;
  v5litepod-*) default=v2-alpha-tpuv5-lite ;;
  v5p-*) default=v2-alpha-tpuv5 ;;
  v6e-*) default=v2-alpha-tpuv6e ;;
  *) default='' ;;
esac
version=${version:-$default}
[[ -n $version ]] || fail "--version is needed for --type $type; see gcloud compute tpus versions list."

cloud=(gcloud compute tpus "$kind") nodes=("$name")
if ((slices > 1)); then
  for ((index = 0; index < slices; index++)); do nodes[index]=$name-$index; done
fi

state() { # prints nothing where there is no such slice
  local field=state
  [[ $kind == tpu-vm ]] || field=state.state
  "${cloud[@]}" describe "$name" "${where[@]}" --format="value($field)" 2>/dev/null || true
}

remove() {
  local force=()
  [[ $kind == tpu-vm ]] || force=(--force)
  run "${cloud[@]}" delete "$name" "${where[@]}" "${force[@]}" --quiet
}

create() {
  if [[ $kind == tpu-vm ]]; then
    run "${cloud[@]}" create "$name" "${where[@]}" --accelerator-type="$type" --version="$version" "${capacity[@]}"
    return
  fi
  local nodes=(--node-id="$name")
  ((slices == 1)) || nodes=(--node-count="$slices" --node-prefix="$name")
  run "${cloud[@]}" create "$name" "${where[@]}" "${nodes[@]}" --accelerator-type="$type" \
    --runtime-version="$version" "${capacity[@]}" --quiet
}

ready() { # creates the slice where it is not there, and waits for it
  local now=''
  if $dry_run; then
    create
    echo "# waits until it is there"
    return
  fi
  while now=$(state); do
    case $now in
      READY | ACTIVE) return ;;
      '') create || return ;;
      PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED)
        echo "$name is $now: it is created again"
        remove && create || return
        ;;
      *) echo "$name is $now" && sleep "$pause" ;;
    esac
  done
}

at_nodes() { # COMMAND...: for all nodes at once, @node@ standing for the name; a mistake (exit code 2) at one counts most
  local node process command started=() code=0 last
  for node in "${nodes[@]}"; do
    command=("${@//@node@/$node}")
    echo "+ $(quoted "${command[@]}")"
    if ! $dry_run; then
      "${command[@]}" &
      started+=($!)
    fi
  done
  trap 'kill "${started[@]}" 2>/dev/null; exit 130' INT TERM
  for process in "${started[@]}"; do
    last=0
    wait "$process" || last=$?
    ((last == 0 || code == 2)) || code=$last
  done
  trap - INT TERM
  return "$code"
}

archive=$(mktemp -d)/mmcore_jax.tar.gz
trap 'rm -rf "$(dirname "$archive")"' EXIT
# What an earlier attempt may have left running holds the chips: it goes first.
there="{ mkdir -p mmcore_jax && tar -xzf mmcore_jax.tar.gz -C mmcore_jax || exit 1; } && cd mmcore_jax && { $setup; } &&"
there+=" { pkill -TERM -f [m]mcore_jax.train; while pgrep -f [m]mcore_jax.train >/dev/null; do sleep 1; done;"
there+=" exec bash launch/host.sh tpu $(quoted "$@"); }"

attempt() {
  local here vm=(gcloud compute tpus tpu-vm) # of queued resources, ssh starts at 64 hosts at once and no more
  ready || return
  mapfile -t here < <(find . -mindepth 1 -maxdepth 1 ! -name .git ! -name .venv ! -name data ! -name runs \
    ! -name checkpoints | sort)
  run tar -czf "$archive" "${here[@]}" || return 1
  at_nodes "${vm[@]}" scp "$archive" @node@: "${where[@]}" --worker=all --quiet || return
  at_nodes "${vm[@]}" ssh @node@ "${where[@]}" --worker=all --quiet --command="$there" || return
}

until_done attempt
if $delete; then
  remove
else
  echo "$name is still there, and paid for; this deletes it:"
  echo "  $(quoted "${cloud[@]}" delete "$name" "${where[@]}")"
fi
