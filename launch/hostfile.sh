#!/usr/bin/env bash
# One run on the hosts of a file, started from here over ssh.
# Copy this file, edit the variables, and start the copy. Further key=value arguments are passed on:
#   ./hostfile.sh trainer.epochs=2 run.dir=/shared/runs/mine
# The same command again continues a run that was stopped (exit code 75) or killed, if run.dir is given.
set -euo pipefail

# One `HOST slots=N` a line (hostfile.example).
HOSTFILE=${HOSTFILE:-hosts}

# What to train, and how to reach the hosts.
SETTINGS=(
  experiment=quickstart
  launch=hostfile
  "launch.hostfile=$HOSTFILE"
  # launch.exclude=node3
  # launch.user=me
  # launch.port=2222
  # launch.interface=ib0
  # "launch.export_env=[MY_SETTING]"
)

exec dstune train "${SETTINGS[@]}" "$@"
