"""For tests and benchmarks, ours and yours: measuring time (``bench``) and memory (``memory``) truthfully."""
