"""Targets for attention on an H200, and the measured values."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu.attention import Timed
from benchmarks.page import Table

FORWARD, BOTH, DENSE = 0.75, 0.65, 4.0
# Memory per token may grow by this factor with the row; tile lists have one number per 8192 pairs.
GROWTH = 1.1


def targets(timings: Sequence[Timed]) -> Table:
    """The worst row of the kernel that `auto` chooses, for each target."""
    chosen = [timed for timed in timings if timed.kernel == timings[0].kernel]
    longest = max(timed.tokens for timed in chosen if timed.dense is not None)
    # Rows with paths only.
    masked = [timed for timed in chosen if timed.tokens == longest and timed.share < 0.99]
    shortest = {timed.row: timed for timed in chosen if timed.tokens == chosen[0].tokens}
    measures = [
        ("of the bound by visible pairs, forward", FORWARD, [(t.of_bound[0], t) for t in chosen]),
        ("of the bound by visible pairs, forward+backward", BOTH, [(t.of_bound[1], t) for t in chosen]),
        (f"times dense-mask SDPA at {longest}, forward", DENSE, [(t.times_dense[0], t) for t in masked]),
        (
            f"times dense-mask SDPA at {longest}, forward+backward",
            DENSE,
            [(t.times_dense[1], t) for t in masked],
        ),
    ]
    rows = []
    for measure, minimum, values in measures:
        worst, where = min(values, key=lambda pair: pair[0])
        met = "yes" if worst >= minimum else "no"
        rows.append([measure, f">= {minimum:g}", f"{worst:.2f}", f"{where.row}, {where.tokens}", met])
    grown = [
        ((timed.ours[1].mib / max(first.ours[1].mib, 1e-9)) / (timed.tokens / first.tokens), timed)
        for timed in chosen
        if timed is not (first := shortest[timed.row])
    ]
    if grown:
        worst, where = max(grown, key=lambda pair: pair[0])
        met = "yes" if worst <= GROWTH else "no"
        measure = f"memory per token, relative to {chosen[0].tokens} tokens"
        rows.append([measure, f"<= {GROWTH:g}", f"{worst:.2f}", f"{where.row}, {where.tokens}", met])
    return Table(f"Targets for {chosen[0].kernel}", ("measure", "target", "worst row", "which", "met"), rows)
