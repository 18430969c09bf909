#!/bin/sh
# Builds the native module with AddressSanitizer and UBSan into a copy of the tree and runs the kernel tests on it.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$root" && command -v "${PYTHON:-python3}")
case $python in /*) ;; *) python=$root/$python ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root/setup.py" "$root/pyproject.toml" "$root/csrc" "$root/grpo_kernels" "$root/python_tests" "$work"
rm -f "$work"/grpo_kernels/*.so
cd "$work"
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g"
CXXFLAGS="$flags" LDFLAGS="-fsanitize=address,undefined" "$python" setup.py -q build_ext --inplace
runtime=$(${CXX:-c++} -print-file-name=libasan.so):$(${CXX:-c++} -print-file-name=libubsan.so)
# Leaks are off: the interpreter's own would drown ours.
LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$work "$python" -m pytest -q -m "not slow" \
  python_tests/test_logps.py python_tests/test_losses.py python_tests/test_linear.py python_tests/test_edges.py python_tests/test_advantages.py \
  python_tests/test_diversity.py python_tests/test_returns.py
