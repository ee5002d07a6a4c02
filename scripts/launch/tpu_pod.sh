#!/usr/bin/env bash
# A TPU pod slice of Google Cloud: create it, install, train, delete.
#   PROJECT=my-project ZONE=us-west4-a BUCKET=my-bucket scripts/launch/tpu_pod.sh
# scripts/plan.py tells beforehand whether the run fits the slice.
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${BUCKET:?a bucket for data and runs}"
NAME=${NAME:-jaxgpt} TYPE=${TYPE:-v5litepod-16} RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
tpu() { gcloud compute tpus tpu-vm "$@" --project "$PROJECT" --zone "$ZONE"; }
everywhere() { tpu ssh "$NAME" --worker=all --command "$1"; }

tpu create "$NAME" --accelerator-type "$TYPE" --version "$RUNTIME" --spot
trap 'tpu delete "$NAME" --quiet' EXIT
tpu scp --recurse --worker=all . "$NAME":jaxgpt
everywhere "cd jaxgpt && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu,gcs]'"
everywhere "cd jaxgpt && JAX_NUM_PROCESSES=auto .venv/bin/python scripts/pretrain.py \
  --config configs/pretrain/gpt2-124m-8gpu.yaml --data.path gs://$BUCKET/data --run gs://$BUCKET/runs/gpt2 \
  --mesh.data 1 --mesh.fsdp -1"
# A spot slice that is taken away gets SIGTERM first: the run saves. Create it again with the same
# command and it goes on.
