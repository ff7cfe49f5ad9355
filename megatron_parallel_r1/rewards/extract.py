r"""The final answer of a response's main text.

The caller gives the text outside the parallel blocks: an answer inside a path or a summary is none.

Which one wins: the last `Final Answer: …` line that says something; if that line holds a `\boxed{…}`, the
box's content. Without such a line, the last box of the text. A box is `\boxed{…}` or `\fbox{…}` with its
braces balanced, or `\boxed 5` up to the next blank; of nested ones the inner. One that never closes (a
truncated response) and an empty one are none.

Everything here is one pass over the text, whatever it contains.
"""

from __future__ import annotations

import re

from megatron_parallel_r1.utils.latex import last_box

_MARKER = re.compile(r"final[ \t]{1,4}answer[ \t*_]{0,8}[:：][*_]{0,4}", re.IGNORECASE)
_NOTHING = {"", "$", "$$", "\\[", "\\("}  # a display formula opens: the answer stands on the next line


def extract_answer(text: str) -> str | None:
    """The final answer in `text`, stripped of surrounding blanks; None if there is none."""
    stop = len(text)
    for marker in reversed(list(_MARKER.finditer(text))):
        if answer := _first_line(text[marker.end() : stop]):
            return answer
        stop = marker.start()
    return last_box(text)


def _first_line(text: str) -> str | None:
    """The first line that says something, or the box that it opens (a matrix may span lines)."""
    start = 0
    for line in text.splitlines(keepends=True):
        start += len(line)
        if line.strip(" \t\r\n*_") not in _NOTHING:
            return last_box(text, before=start) or line.strip().strip("*_ \t") or None
    return None
