"""Random calls of the losses, compared with an implementation that shares no line with the library: `oracle.py` has the
formulas of docs/objectives.md in numpy, `calls.py` draws the calls, `compare.py` says how far a result may be off.
`python -m fuzz --help` runs as many as you like."""
