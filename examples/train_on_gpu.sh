#!/bin/sh
# One GPU: HardNet and DesNet at the same time, then HardNet light, on an archive of
# examples/pack_training_data.py.
#
#   sh examples/train_on_gpu.sh DATA.tar OUT [MINUTES] [DEVICE] [SEEDS]
#
# More than half of MINUTES (20) for HardNet, once for each of SEEDS (4) at the same time, and the
# rest for its light form, taught by the seed with the best validation; DesNet trains all the time.
# All training data are drawn on the GPU. Needs this repository, torch and lightning, no COLMAP and
# no installation. OUT gets the weights, their logs and checkpoints: run it again with the same OUT
# to resume.
set -eu
data=$1
out=$2
minutes=${3:-20}
device=${4:-cuda}
seeds=${5:-4}
here=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
tar -xf "$data" -C "$scratch"
mkdir -p "$out"
# the version that an installation would have
meta="$scratch/meta/tiepoints.dist-info"
mkdir -p "$meta"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/pyproject.toml")
printf 'Metadata-Version: 2.1\nName: tiepoints\nVersion: %s\n' "$version" > "$meta/METADATA"
export PYTHONPATH="$here/src:$scratch/meta"
export OMP_NUM_THREADS=4 # several trainings share the processor
validation=""
for scene in "$scratch"/held_out/*; do
    validation="$validation --validation $scene --validation-reconstructions $scene"
done

train() { # MODEL NAME SHARE OPTIONS...
    model=$1
    name=$2
    each=$(awk "BEGIN { print $minutes * $3 }")
    shift 3
    resume=""
    [ -f "$out/$name.safetensors.checkpoint" ] && resume="--resume"
    # unquoted on purpose: a list of options
    python3 -m tiepoints train "$model" --images "$scratch/photos" --images "$scratch/scenes" \
        --reconstructions "$scratch/scenes" $validation --minutes "$each" --precision auto \
        --device "$device" --on-device --no-compare --workers 4 \
        --output "$out/$name.safetensors" $resume "$@" > "$out/$name.log" 2>&1
}

best() { # the largest validation score of a training
    awk -F, 'NR > 1 && $3 > best { best = $3 } END { print best + 0 }' \
        "$out/$1.safetensors.log/log.csv"
}

train desnet desnet 0.97 --width 2 --init desnet --batch-size 32 --learning-rate 2e-3 \
    --validate-every 1500 &
dense=$!
running=""
failed="" # of several trainings, the others go on
for seed in $seeds; do
    train hardnet "hardnet-$seed" 0.56 --seed "$seed" --init hardnet --batch-size 32 \
        --learning-rate 2e-3 --validate-every 1500 &
    running="$running $!"
done
for job in $running; do wait "$job" || failed=1; done
chosen=$(for seed in $seeds; do echo "$(best "hardnet-$seed") $seed"; done | sort -g | tail -n 1)
hardnet="$out/hardnet-${chosen#* }.safetensors"
echo "HardNet: validation and seed $chosen"
train hardnet-light hardnet-light 0.40 --init hardnet-light --teacher "$hardnet" --batch-size 32 \
    --learning-rate 3e-3 --validate-every 1500 || failed=1
wait "$dense" || failed=1
[ -z "$failed" ] || { echo "a training failed; see $out/*.log" >&2; exit 1; }
