#!/usr/bin/env sh
# Compiles the Triton kernels under other versions of Triton, each installed into a folder of its own:
# `make triton-versions`, or with the versions as ARGS. Triton 3.4 needs a ROCm linker for gfx942 and is not asked.
set -eu
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
[ $# -gt 0 ] || set -- 3.4.0 3.5.1 3.6.0
unset TRITON_INTERPRET
for version in "$@"; do
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder/$version" "triton==$version"
  for target in "cuda 80" "cuda 90" "cuda 100" "hip gfx942"; do
    if [ "$version $target" = "3.4.0 hip gfx942" ]; then continue; fi
    for script in dry_rows dry_tokens; do
      found=$(PYTHONPATH="$folder/$version:.:python_tests" TRITON_CACHE_DIR="$folder/cache" "$python" python_tests/kernels/$script.py $target)
      echo "triton $version, $script: $found"
    done
  done
done
