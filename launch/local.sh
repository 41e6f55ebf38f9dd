#!/usr/bin/env bash
# One run on this machine: one process a GPU, two on a machine without.
# Copy this file, edit the variables, and start the copy. Further key=value arguments are passed on:
#   ./local.sh trainer.epochs=2 run.dir=runs/mine
# The same command again continues a run that was stopped (exit code 75) or killed, if run.dir is given.
set -euo pipefail

# What to train: an experiment of conf/experiment, or single groups and keys.
SETTINGS=(
  experiment=quickstart
)

# GPUs to use; all when not set. An empty value trains on the CPU.
# export CUDA_VISIBLE_DEVICES=0,1

# Where models, data and samples are cached.
# export HF_HOME=/scratch/$USER/huggingface
# export DSTUNE_CACHE=/scratch/$USER/dstune

# No contact with the hub: everything has to be in the caches.
# export HF_HUB_OFFLINE=1

exec dstune train "${SETTINGS[@]}" "$@"
