"""Random calls of the losses and the advantages, compared with implementations that share no line with the library.

`terms.py`, `oracle.py` and `vocabulary.py` have the formulas of docs/objectives.md in numpy, `calls.py` draws the calls,
`build.py` makes their tensors, `answer.py` asks the library, `compare.py` says how far it may be off; `advantages.py` is
all of that for group_advantages and gae. `python -m fuzz --help`, in this folder's parent, runs as many as you like.
"""
