#!/usr/bin/env bash
# One run whose ranks Open MPI's mpirun starts: every rank of it becomes a worker.
# Copy this file, edit the variables, and start the copy. Further key=value arguments are passed on:
#   ./mpirun.sh trainer.epochs=2 run.dir=runs/mine
# (`dstune train launch=openmpi` starts mpirun itself, checks the hosts first and writes a log for each rank.)
set -euo pipefail

# Ranks in all: one for each GPU.
RANKS=${RANKS:-2}

# What to train.
SETTINGS=(
  experiment=quickstart
)

OPTIONS=(
  -n "$RANKS"
  --bind-to none
  # --hostfile hosts
  # -x HF_HOME -x DSTUNE_CACHE
  # --mca btl_tcp_if_include ib0
)

exec mpirun "${OPTIONS[@]}" dstune train "${SETTINGS[@]}" "$@"
