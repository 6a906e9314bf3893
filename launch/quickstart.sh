#!/usr/bin/env bash
# MMCORE, small, from nothing to pictures: data, stages 0, 1 and 2, samples, scores. Two CPU cores are enough.
#
#     bash launch/quickstart.sh [--smoke] [--seed N]
#
# --smoke   a few steps of everything, to see that it works; the pictures are noise
# --seed N  another seed, in runs/seedN
#
# Run again, it continues where it stopped.
set -euo pipefail

recipe=openmoji runs=runs seed=0
while (($#)); do
  case $1 in
    --smoke) recipe=smoke ;;
    --seed)
      [[ ${2:-} =~ ^(0|[1-9][0-9]*)$ ]] || { echo "error: --seed needs a number, for example --seed 1." >&2; exit 2; }
      seed=$2 runs=runs/seed$2
      shift
      ;;
    *) echo "error: unknown argument $1; usage: bash launch/quickstart.sh [--smoke] [--seed N]" >&2; exit 2 ;;
  esac
  shift
done

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" openmoji

stage0=$runs/stage0-$recipe stage1=$runs/stage1-$recipe stage2=$runs/stage2-$recipe
pictures=$stage2/pictures
sampling=(--workdir="$stage2" --seed="$seed") evaluation=(--workdir="$stage2" --suite=openmoji)
if [[ $recipe == smoke ]]; then
  sampling+=(--steps=2) evaluation+=(--steps=2 --cases=10)
fi

headline() { printf '\n[%s] %s (%d:%02d)\n' "$1" "$2" $((SECONDS / 60)) $((SECONDS % 60)); }

train() { # STAGE [ARGUMENTS]
  local workdir="$runs/$1-$recipe"
  python -m mmcore_jax.train --config="configs/$1.py:$recipe" --workdir="$workdir" --config.seed="$seed" "${@:2}"
}

headline 1/6 "preparing the drawings of OpenMoji"
python -m mmcore_jax.prepare --dataset openmoji --output data/openmoji

headline 2/6 "training stage 0: a vision encoder"
train stage0

headline 3/6 "training stage 1: the VLM learns to predict visual embeddings"
train stage1 --config.init.vision_target="$stage0"

headline 4/6 "training stage 2: the diffusion transformer learns to draw"
train stage2 --config.init.{vlm,queries,connector}="$stage1"

headline 5/6 "drawing"
mkdir -p "$pictures"
python - "$pictures/red-heart.png" <<'END'
import pathlib, sys
from mmcore_jax.data.openmoji import load_drawings
pathlib.Path(sys.argv[1]).write_bytes(load_drawings("data/openmoji")["2764"])
END
cat >"$pictures/requests.json" <<'END'
[
  {"prompt": "make the heart blue", "images": ["red-heart.png"], "output": "blue-heart.png"},
  {"prompt": "a water wave", "output": "water-wave.png"}
]
END
python -m mmcore_jax.sample "${sampling[@]}" --requests="$pictures/requests.json" --output="$pictures"

headline 6/6 "evaluating"
python -m mmcore_jax.evaluate "${evaluation[@]}"

headline "done" "pictures, scores"
cat <<END
pictures:    $PWD/$pictures/
sheets:      $PWD/$stage2/evaluation/
scoreboard:  $PWD/$stage2/evaluation/scores.txt
END
