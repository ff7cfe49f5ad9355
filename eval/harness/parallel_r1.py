"""Answer extraction and verification for the tasks of this folder.

lm-evaluation-harness imports this module by its name in the YAML files beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_parallel_r1.evaluation.answers import final_answer, is_right


def final_answers(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Filter: the final answer of each response to each problem, empty for none."""
    return [[final_answer(response or "") or "" for response in responses] for responses in resps]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score of one problem: the filtered answer against the row's, compared as mathematics."""
    return {"exact_match": float(is_right(results[0], doc["answer"]))}
