"""The command `grpo-kernels`: demo, benchmark, memory profiler, doctor. The library imports none of it."""
