#!/bin/sh
# One GPU: HardNet and DesNet at the same time, then HardNet light, on an archive of
# examples/pack_training_data.py.
#
#   sh examples/train_on_gpu.sh DATA.tar OUT [MINUTES] [WORKERS] [DEVICE]
#
# Two thirds of MINUTES (20) for HardNet, whose patches are drawn on the GPU, and the rest for its
# light form; WORKERS (11) processes make the pairs of DesNet all the time. Needs this repository,
# torch and lightning, no COLMAP and no installation. OUT gets the weights, their logs and
# checkpoints: run it again with the same OUT to resume.
set -eu
data=$1
out=$2
minutes=${3:-20}
workers=${4:-11}
device=${5:-cuda}
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
validation=""
for scene in "$scratch"/held_out/*; do
    validation="$validation --validation $scene --validation-reconstructions $scene"
done

train() { # MODEL SHARE OPTIONS...
    name=$1
    each=$(awk "BEGIN { print $minutes * $2 }")
    shift 2
    resume=""
    [ -f "$out/$name.safetensors.checkpoint" ] && resume="--resume"
    # unquoted on purpose: a list of options
    python3 -m tiepoints train "$name" --images "$scratch/photos" --images "$scratch/scenes" \
        --reconstructions "$scratch/scenes" $validation --minutes "$each" --precision auto \
        --device "$device" --no-compare --output "$out/$name.safetensors" $resume "$@"
}

OMP_NUM_THREADS=1 train desnet 0.95 --width 2 --init desnet --batch-size 32 --learning-rate 2e-3 \
    --validate-every 250 --workers "$workers" > "$out/desnet.log" 2>&1 &
train hardnet 0.6 --on-device --init hardnet --batch-size 32 --learning-rate 2e-3 \
    --validate-every 1000 --workers 4
train hardnet-light 0.3 --on-device --init hardnet-light --teacher "$out/hardnet.safetensors" \
    --batch-size 32 --learning-rate 3e-3 --validate-every 1000 --workers 4
wait
