#!/usr/bin/env bash
# Everything that is measured on a GPU, in one call: benchmarks/gpu.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
PYTHONPATH=$PWD exec "$python" benchmarks/gpu.py "$@"
