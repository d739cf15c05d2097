#!/bin/sh
# Twenty minutes of one GPU: HardNet and DesNet trained on an archive of examples/pack_training_data.py.
#
#   sh examples/train_on_gpu.sh DATA.tar OUT [MINUTES] [WORKERS]
#
# Half of MINUTES for each network; WORKERS processes make the batches. Needs this repository, torch and lightning, no COLMAP.
# OUT gets the weights, their logs and checkpoints: run it again with the same OUT to resume.
set -eu
data=$1
out=$2
minutes=${3:-20}
workers=${4:-15}
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$here/src" OMP_NUM_THREADS=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
tar -xf "$data" -C "$scratch"
mkdir -p "$out"
each=$(awk "BEGIN { print $minutes / 2 }")
validation=""
for scene in "$scratch"/held_out/*; do
    validation="$validation --validation $scene --validation-reconstructions $scene"
done
for model in desnet hardnet; do
    options="--batch-size 32 --init $model"
    [ "$model" = desnet ] && options="--batch-size 16 --width 2 --init desnet"
    [ -f "$out/$model.safetensors.checkpoint" ] && options="$options --resume"
    # unquoted on purpose: lists of options
    python -m tiepoints train "$model" --images "$scratch/photos" --reconstructions "$scratch/scenes" $validation $options \
        --minutes "$each" --workers "$workers" --precision auto --validate-every 200 --output "$out/$model.safetensors"
done
