#!/bin/sh
# Everything that needs a GPU, in one command: build, tests, compute-sanitizer, benchmarks; see gpu_check.py.
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu_check "$@"
