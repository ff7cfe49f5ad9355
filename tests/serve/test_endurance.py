"""Many requests in a row, every tenth broken off: memory stays flat, nothing hangs, nothing is left."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.serve_load import endure, ours


def test_broken_off_requests_leave_nothing(release: Path) -> None:
    """`endure` itself fails if a request hangs or anything is left; the first requests warm the server up."""
    with ours(release) as (url, server):
        asyncio.run(endure(url, server, [[8, 9]] * 100))
        early, late = asyncio.run(endure(url, server, [[8 + number % 20, 9] for number in range(300)]))
    # 270 requests; a leak of 100 KiB each would be 26 MiB.
    assert late - early < 2**24
