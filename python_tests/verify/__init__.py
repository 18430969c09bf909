"""Proves, with SentryWard, that launches of the library are free of races and deadlocks in every schedule.

`capture` makes the library launch (with ptx/nvcc.py and ptx/triton_launch.py) and keeps each launch's PTX and a
description of its parameters. `rewrites` changes the PTX so that SentryWard 0.1.1 can analyse it, and documents what
each change removes from the proof. `check` gets a verdict, and `cases` lists the launches. The verdicts are in
docs/reliability.md.

A proof covers one launch configuration: the blocks' barriers, mbarriers, copies and shared memory, and conflicting
accesses to global memory. It does not cover values, fences, atomics between blocks, or the other side of branches on
floats.
"""
