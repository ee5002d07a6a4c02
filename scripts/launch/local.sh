#!/usr/bin/env bash
# Several processes on this machine, over the loopback interface:
#   scripts/launch/local.sh 4 scripts/pretrain.py --run runs/demo --mesh.fsdp 4
# On a cluster of your own, run the inner line on every host, with the address of the first one.
set -euo pipefail
count=$1; shift
for ((i = 0; i < count; i++)); do
  JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-12345} JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$i \
    python "$@" &
done
trap 'kill $(jobs -p)' INT TERM  # SIGTERM: all save and exit
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit "$status"
