"""How long to wait before a request is tried again."""

from __future__ import annotations

import random
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

PATIENCE_S = 3600.0
"""A server that wants a longer pause is not waited for."""


def backoff_s(first_s: float, longest_s: float, attempt: int, seed: int) -> float:
    """The wait before retry `attempt` (0, 1, …): half to all of first_s * 2**attempt, at most longest_s.

    The half that is left to chance keeps requests apart that failed together; `seed` fixes it.
    """
    whole = min(longest_s, first_s * 2.0 ** min(attempt, 60))
    return whole * random.Random(f"{seed}/{attempt}").uniform(0.5, 1.0)


def retry_after_s(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a `Retry-After` header asks for (RFC 9110, 10.2.3: seconds or a date); None without one.

    A header that is neither is none.
    """
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - (now or datetime.now(timezone.utc))).total_seconds())
