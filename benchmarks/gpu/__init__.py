"""The checks on a GPU, in pieces of seconds, which benchmarks/gpu_check.py runs."""
