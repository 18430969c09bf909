#!/bin/sh
# Builds the CPU's native module and the emulated CUDA kernels with AddressSanitizer and UBSan into a copy of the tree and
# runs the kernel tests on them.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$root" && command -v "${PYTHON:-python3}")
case $python in /*) ;; *) python=$root/$python ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root/setup.py" "$root/pyproject.toml" "$root/csrc" "$root/grpo_kernels" "$root/python_tests" "$work"
rm -f "$work"/grpo_kernels/backends/*.so
cd "$work"
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g"
export CXXFLAGS="$flags" LDFLAGS="-fsanitize=address,undefined" GRPO_KERNELS_CUDA=0
"$python" setup.py -q build_ext --inplace
GRPO_KERNELS_EMULATED=1 "$python" setup.py -q build_ext --inplace
runtime=$(${CXX:-c++} -print-file-name=libasan.so):$(${CXX:-c++} -print-file-name=libubsan.so)
# Leaks are off: the interpreter's own would drown ours.
LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$work "$python" -m pytest -q -m "not slow" \
  python_tests/loss/test_logps.py python_tests/loss/test_losses.py python_tests/loss/test_linear.py python_tests/loss/test_edges.py python_tests/advantages/test_advantages.py \
  python_tests/advantages/test_diversity.py python_tests/advantages/test_returns.py python_tests/kernels/test_cuda_rows.py python_tests/kernels/test_cuda_tokens.py \
  python_tests/kernels/test_cuda_boundaries.py
