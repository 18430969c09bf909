"""What a GPU is asked, in pieces of seconds: see benchmarks/gpu_check.py, which runs them."""
