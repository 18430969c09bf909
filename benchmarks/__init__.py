"""`pytest benchmarks` runs everything once on tiny inputs; see conftest.py for the measurement itself."""
