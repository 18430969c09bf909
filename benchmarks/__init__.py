"""`pytest benchmarks` runs everything once on tiny inputs. conftest.py says how to measure."""
