"""Answer extraction and verification for the tasks of this folder.

lm-evaluation-harness imports this module by its name in the YAML files beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_parallel_r1.data.trace_text import WrittenTrace
from megatron_parallel_r1.rewards.verification import extract_answer
from megatron_parallel_r1.rewards.verifier import equivalent


def final_answers(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Filter: the final answer of each response to each problem, empty for none."""
    return [[_final_answer(response or "") or "" for response in responses] for responses in resps]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score of one problem: the filtered answer against the row's, compared as mathematics."""
    return {"exact_match": float(is_right(results[0], doc["answer"]))}


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


def _final_answer(response: str) -> str | None:
    """The final answer of the main text; answers inside a path or a summary do not count."""
    return extract_answer(WrittenTrace.of(response, strict=False).main)
