"""Two runs side by side: what became slower or larger beyond the noise of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..tables import Table
from ..units import milliseconds, readable_bytes
from .results import Results
from .table import timed

THRESHOLD = 0.05  # a change of the ratio below this is never flagged
HEADINGS = ("case", "provider", "before ms", "now ms", "change", "noise", "verdict")


@dataclass(frozen=True)
class Change:
    """How one provider changed in one case. Times are compared as multiples of the run's own unit, so that a slower
    machine does not count; `noise` is the larger relative half-width of the quartiles of the four times."""

    case: str
    provider: str
    before: float  # seconds
    now: float
    ratio: float  # of the multiples, now by before
    noise: float
    peak_before: int | None = None
    peak_now: int | None = None

    @property
    def verdict(self) -> str:
        limit = max(THRESHOLD, 2 * self.noise)
        slower = self.ratio > 1 + limit
        larger = bool(self.peak_before and self.peak_now and self.peak_now > self.peak_before * (1 + THRESHOLD))
        if slower or larger:
            return " and ".join(word for word, said in (("SLOWER", slower), ("MORE MEMORY", larger)) if said)
        return "faster" if self.ratio < 1 / (1 + limit) else "same"

    @property
    def regression(self) -> bool:
        return self.verdict.isupper()


def compare(before: Results, now: Results, *, force: bool = False) -> list[Change]:
    """Changes of the cases in both. Raises ValueError for different devices, unless forced, or no common case."""
    if before.device != now.device and not force:
        raise ValueError(f"different devices, which says nothing of the code: {before.device} | {now.device}")
    changes = list(_changes(before, now))
    if not changes:
        raise ValueError("the two results have no case in common")
    return changes


def _changes(before: Results, now: Results) -> Iterator[Change]:
    old = {record["case"]: record for record in before.records if "unit_seconds" in record}
    for record in now.records:
        past = old.get(record["case"])
        if past is None or "unit_seconds" not in record:
            continue
        for name, entry in timed(record).items():
            was = timed(past).get(name)
            if was is None:
                continue
            units = past["unit_seconds"], record["unit_seconds"]
            ratio = (entry["seconds"] / units[1]["seconds"]) / (was["seconds"] / units[0]["seconds"])
            noise = max((x["high"] - x["low"]) / 2 / x["seconds"] for x in (was, entry, *units))
            yield Change(
                record["case"], name, was["seconds"], entry["seconds"], ratio, noise, was.get("peak_bytes"),
                entry.get("peak_bytes"),
            )  # fmt: skip


def comparison_table(changes: list[Change]) -> Table:
    rows = []
    for c in changes:
        change, verdict = f"{100 * (c.ratio - 1):+.0f} %", c.verdict
        if "MEMORY" in verdict:
            verdict += f" ({readable_bytes(c.peak_before or 0)} to {readable_bytes(c.peak_now or 0)})"
        times = milliseconds(c.before), milliseconds(c.now)
        rows.append([c.case, c.provider, *times, change, f"{100 * c.noise:.0f} %", verdict])
    return Table(HEADINGS, rows)
