"""Final answers of plain texts, for evaluation harnesses that see a server's text and no tokens."""

from __future__ import annotations

import re

from megatron_parallel_r1.rewards.verification import extract_answer
from megatron_parallel_r1.rewards.verifier import equivalent
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tags import TAG_TEXTS, Tags

_TAG = re.compile("(" + "|".join(map(re.escape, TAG_TEXTS)) + ")")
_TAGS = Tags(0, 1, 2, 3, 4, 5, eos=6)  # in the order of TAG_TEXTS
_TEXT = len(TAG_TEXTS) + 1


def main_text(response: str) -> str:
    """The text of a response outside its blocks and summaries."""
    pieces = [piece for piece in _TAG.split(response) if piece]
    tree = parse([TAG_TEXTS.index(piece) if piece in TAG_TEXTS else _TEXT for piece in pieces], _TAGS)
    return "\n".join("".join(pieces[start:stop]) for start, stop in tree.main_spans())


def final_answer(response: str) -> str | None:
    """The final answer of the main text; answers inside a path or a summary do not count."""
    return extract_answer(main_text(response))


def is_right(answer: str | None, published: object) -> bool:
    """Whether an answer equals that of a data set's row.

    Args:
        published: a number or a text; of GSM8K's worked answer the part after `####` counts.
    """
    text = str(published)
    _, mark, value = text.rpartition("####")
    reference = value.replace(",", "") if mark else text
    if isinstance(published, float) and published.is_integer():
        reference = str(int(published))
    return equivalent(answer, reference.strip())
