"""Proves, with SentryWard, that launches of the library are free of races and deadlocks in every schedule.

`capture` makes the library launch (by ptx/nvcc.py and ptx/triton_launch.py) and keeps each launch as PTX and what the
verifier is told of its parameters; `rewrites` turns the PTX into something that SentryWard 0.1.1 follows, and says of
each change what is no longer shown; `check` asks for a verdict; `cases` is what is asked. docs/reliability.md has the
verdicts.

What a proof here is about: one launch configuration, the blocks' barriers, mbarriers, copies and shared memory, and
accesses to global memory that conflict. It says nothing of values, fences, atomics between blocks, or what a float
decides the other way.
"""
