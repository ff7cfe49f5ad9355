r"""Judges whole batches of traces: extracts each final answer, verifies it, and checks the format.

Only the text outside the parallel blocks counts: an answer inside a path or a summary is ignored. The final
answer is the last `Final Answer: …` line that is not blank; if that line contains a `\boxed{…}`, the content
of the box. Without such a line, it is the last box of the text; without a box, what follows the last `#### `,
`Answer:` or `the answer is`. A box is `\boxed{…}` or `\fbox{…}` with balanced braces, or `\boxed 5` up to
the next blank; of nested boxes the inner one. Boxes joined by `and`, `or` or a comma are one answer. A box
that never closes (a truncated response) and an empty box do not count. Extraction is one pass over any text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.fast_equality import Verdict
from megatron_parallel_r1.rewards.format_check import Format
from megatron_parallel_r1.rewards.path_diversity import trace_difference
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.thought.layout import critical_length
from megatron_parallel_r1.thought.tree import Tree
from megatron_parallel_r1.utils.latex import last_boxes

_MARKER = re.compile(r"final[ \t]{1,4}answer[ \t*_]{0,8}[:：][*_]{0,4}", re.IGNORECASE)
_CLAIM = re.compile(
    r"#### *(?P<marked>\S[^\n]*)"
    r"|(?<![a-z])ans(?:wer)?(?:[ \t*_]{0,4}[:：=][ \t*_]{0,4}(?P<named>[^\s*_][^\n]*)"
    r"|[ \t]{1,4}is:?[ \t*_]{1,4}(?P<stated>(?:[^\w\s]|\d|[a-z](?![a-z]))[^\n]*))",
    re.IGNORECASE,
)
_NEXT_SENTENCE = re.compile(r"\.\s+[A-Z]")
_NO_CONTENT = {"", "$", "$$", "\\[", "\\("}  # opens a display formula: the answer is on the next line

MAX_CLAIM = 2000
"""A final answer without a marker or a box is looked for in this many characters at the end."""


@dataclass(frozen=True, slots=True)
class ResponseToJudge:
    """One response to judge.

    Attributes:
        text: the main text, without blocks and summaries.
        tree: the parallel structure.
        references: right answers, any of which counts.
        sampled: which tokens the policy drew, None for a text without tokens; see `Format.of`.
        tokens: the whole trace, None to skip the comparison of paths.
    """

    text: str
    tree: Tree
    references: tuple[str, ...]
    sampled: tuple[bool, ...] | None = None
    tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert self.references, "a response needs a reference answer"
        assert self.tokens is None or len(self.tokens) == self.tree.length, "tokens and tree are one trace"


def judge(responses: Sequence[ResponseToJudge], verifier: Verifier) -> list[Judged]:
    """Extracts, verifies and checks the format of every response, in order."""
    answers = [extract_answer(response.text) for response in responses]
    pairs = [
        (answer, reference)
        for answer, response in zip(answers, responses, strict=True)
        for reference in response.references
    ]
    verdicts = iter(verifier.check_many(pairs))
    return [
        _judged(response, answer, _best([next(verdicts) for _ in response.references]))
        for answer, response in zip(answers, responses, strict=True)
    ]


def extract_answer(text: str) -> str | None:
    """Returns the final answer in `text`, stripped of surrounding blanks; None without one."""
    stop, answer = len(text), None
    for marker in reversed(list(_MARKER.finditer(text))):
        if answer := _first_line(text[marker.end() : stop]):
            return answer
        stop = marker.start()
    if (boxed := last_boxes(text)) or "\\boxed" in text:
        return boxed
    for claim in _CLAIM.finditer(text, max(0, len(text) - MAX_CLAIM)):
        answer = claim["marked"] or claim["named"] or claim["stated"]
    return _NEXT_SENTENCE.split(answer)[0].strip().strip("*_` \t") or None if answer else None


def _first_line(text: str) -> str | None:
    """Returns the first line with content, or the box that it opens (a matrix may span lines)."""
    start = 0
    for line in text.splitlines(keepends=True):
        start += len(line)
        if line.strip(" \t\r\n*_") not in _NO_CONTENT and not line.lstrip().startswith("```"):
            return last_boxes(text, before=start) or line.strip().strip("*_` \t") or None
    return None


def _judged(response: ResponseToJudge, answer: str | None, verdict: Verdict) -> Judged:
    tokens, tree = response.tokens, response.tree
    return Judged(
        correct=verdict.correct,
        format=Format.of(tree, response.sampled),
        extracted=answer,
        reason=verdict.reason,
        text=response.text,
        references=response.references,
        length=tree.length,
        critical_length=critical_length(tree),
        difference=None if tokens is None else trace_difference(tokens, tree),
    )


def _best(verdicts: Sequence[Verdict]) -> Verdict:
    return next((verdict for verdict in verdicts if verdict.correct), verdicts[-1])
