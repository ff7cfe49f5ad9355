"""What attention was to reach on an H200, and what it did."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu.attention import Timed
from benchmarks.page import Table

FORWARD, BOTH, DENSE = 0.75, 0.65, 4.0
# Memory may grow this much faster than the row; the lists of tiles have one number for 8192 pairs.
GROWTH = 1.1


def targets(found: Sequence[Timed]) -> Table:
    """The worst of the rows under the kernel that `auto` takes, beside each target."""
    mine = [timed for timed in found if timed.kernel == found[0].kernel]
    longest = max(timed.tokens for timed in mine if timed.dense is not None)
    # A mask that hides nothing is none that a path needs.
    masked = [timed for timed in mine if timed.tokens == longest and timed.share < 0.99]
    shortest = {timed.row: timed for timed in mine if timed.tokens == mine[0].tokens}
    asked = [
        ("of the bound by visible pairs, forward", FORWARD, [(t.of_bound[0], t) for t in mine]),
        ("of the bound by visible pairs, forward+backward", BOTH, [(t.of_bound[1], t) for t in mine]),
        (f"times dense-mask SDPA at {longest}, forward", DENSE, [(t.times_dense[0], t) for t in masked]),
        (
            f"times dense-mask SDPA at {longest}, forward+backward",
            DENSE,
            [(t.times_dense[1], t) for t in masked],
        ),
    ]
    rows = []
    for what, least, reached in asked:
        worst, where = min(reached, key=lambda pair: pair[0])
        met = "yes" if worst >= least else "no"
        rows.append([what, f">= {least:g}", f"{worst:.2f}", f"{where.row}, {where.tokens}", met])
    grown = [
        ((timed.ours[1].mib / max(first.ours[1].mib, 1e-9)) / (timed.tokens / first.tokens), timed)
        for timed in mine
        if timed is not (first := shortest[timed.row])
    ]
    if grown:
        worst, where = max(grown, key=lambda pair: pair[0])
        met = "yes" if worst <= GROWTH else "no"
        what = f"memory by token, to that at {mine[0].tokens}"
        rows.append([what, f"<= {GROWTH:g}", f"{worst:.2f}", f"{where.row}, {where.tokens}", met])
    return Table(f"Targets for {mine[0].kernel}", ("measure", "target", "worst row", "which", "met"), rows)
