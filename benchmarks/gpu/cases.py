"""Lists of cases by name; each runs in a separate process: `python -m benchmarks.gpu.cases rows --backend cuda`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from . import graphs, others, probe, rows, stress, timing
from .case import Case, Context, arguments, run_cases

LISTS = {
    "probe": probe.cases, "rows": rows.narrow, "wide": rows.wide, "all-rows": rows.every, "plain": others.plain,
    "gae": others.gae, "sequences": others.sequences, "diversity": others.diversity, "tokens": others.tokens,
    "forms": others.forms, "few": others.few, "stress": stress.cases, "timing": timing.cases, "peers": timing.peers,
    "tuning": timing.tuning, "traffic": timing.traffic, "graphs": graphs.cases,
}  # fmt: skip


def cases_of(name: str, context: Context) -> list[Case]:
    cases = list(LISTS[name](context))
    names = [case.name for case in cases]
    assert len({*names}) == len(names) and not any("|" in n for n in names), names
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv, list(LISTS))
    seed = time.time_ns() % (1 << 31) if options.seed is None else options.seed
    context = Context(options.backend, options.device, seed)
    cases = cases_of(options.list, context)
    if options.family is not None:
        cases = [case for case in cases if case.family == options.family]
    return run_cases(cases, context, options)


if __name__ == "__main__":
    sys.exit(main())
