"""What the tasks of this folder ask of this project: its answer extraction and its verifier.

lm-evaluation-harness imports it by its name in the YAML files beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_parallel_r1.evaluation.answers import final_answer, is_right


def final_answers(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The harness's filter: for each problem its responses in, their final answers out, blank for none."""
    return [[final_answer(response or "") or "" for response in responses] for responses in resps]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The harness's score of one problem: the filtered answer against the row's, algebra included."""
    return {"exact_match": float(is_right(results[0], doc["answer"]))}
