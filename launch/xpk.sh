#!/usr/bin/env bash
# Trains on GKE through xpk, on one slice of TPUs or on several: builds and pushes the image, and submits the workload.
#
#     bash launch/xpk.sh --cluster NAME --zone ZONE --type TYPE --image IMAGE [OPTIONS] -- --config=... [...]
#
# --type TYPE      for example v5litepod-256
# --image IMAGE    where to push to, for example europe-docker.pkg.dev/PROJECT/REPOSITORY/mmcore_jax
# --slices N       (default 1)
# --name NAME      of the workload (default: mmcore-jax)
# --project NAME   (default: that of gcloud)
# --create         creates the cluster first; with --spot of machines that may be taken away
# --setup COMMAND  what each host does first, for example to link `runs` to where xpk mounts storage
# --attempts N     starts in all (default 100)
# --dry-run        prints what it would do
#
# Kubernetes starts all hosts again when one is lost or taken away, and training continues from its newest checkpoint:
# `--workdir` must be on storage that outlives the hosts. Needs xpk, docker and gcloud.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cluster='' type='' image='' slices=1 name=mmcore-jax create=false setup=true where=() capacity=(--on-demand)
while (($#)); do
  case $1 in
    --cluster) need "$@" && cluster=$2 && shift ;;
    --zone) need "$@" && where+=(--zone "$2") && shift ;;
    --project) need "$@" && where+=(--project "$2") && shift ;;
    --type) need "$@" && type=$2 && shift ;;
    --image) need "$@" && image=$2 && shift ;;
    --slices) need "$@" && slices=$2 && shift ;;
    --name) need "$@" && name=$2 && shift ;;
    --setup) need "$@" && setup=$2 && shift ;;
    --attempts) need "$@" && attempts=$2 && shift ;;
    --create) create=true ;;
    --spot) capacity=(--spot) ;;
    --dry-run) dry_run=true ;;
    --help) usage && exit ;;
    --) shift && break ;;
    *) fail "unknown argument $1; see bash $0 --help." ;;
  esac
  shift
done
[[ -n $cluster && -n $type && -n $image && " ${where[*]} " == *" --zone "* ]] ||
  fail "--cluster, --zone, --type and --image are needed."
(($#)) || fail "nothing to train: put -- and the arguments of train at the end."

hardware=(--cluster "$cluster" "${where[@]}" --tpu-type="$type" --num-slices="$slices")
if $create; then
  run xpk cluster create "${hardware[@]}" "${capacity[@]}"
fi
run docker build --build-arg ACCELERATOR=tpu --tag "$image" .
run docker push "$image"
# 1: an exception; 75: stopped by SIGTERM; 134, 137, 143: aborted or killed. 2, a mistake of the user, is final.
run xpk workload create "${hardware[@]}" --workload "$name" --docker-image="$image" \
  --max-restarts="$((attempts - 1))" --restart-on-exit-codes="1,$stopped,134,137,143" \
  --termination-grace-period-seconds=300 --command="{ $setup; } && exec bash launch/host.sh tpu $(quoted "$@")"
