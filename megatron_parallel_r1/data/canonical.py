"""The one spelling of a trace's tags.

The engine forces `<Path>` right behind `<Parallel>` or `</Path>`, and `<Summary>` right behind
`</Parallel>`; `</Parallel>` is forced behind the last `</Path>`. A written trace that has blanks in
these places would train on tokens that no rollout ever contains, so they go. All other white space
is the author's.
"""

from __future__ import annotations

import re

_FORCED_GAP = re.compile(
    r"(?<=<Parallel>)\s+(?=<Path>)"
    r"|(?<=</Path>)\s+(?=<Path>|</Parallel>)"
    r"|(?<=</Parallel>)\s+(?=<Summary>)"
)


def canonical(text: str) -> str:
    """`text` without white space between tags that the engine sets side by side."""
    return _FORCED_GAP.sub("", text)
