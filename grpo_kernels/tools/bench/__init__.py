"""`grpo-kernels bench` and what `benchmarks/` shares with it: cases, their measurement, tables, plots, comparison."""
