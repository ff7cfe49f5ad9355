"""Writes an evaluation's figures into a model card: in a folder, or on the Hugging Face Hub.

The card gets a table, and the same figures as `model-index` metadata, which the Hub shows beside the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from megatron_parallel_r1.errors import UserError, one_line
from megatron_parallel_r1.evaluation.benchmarks import PUBLISHED
from megatron_parallel_r1.evaluation.presentation import evaluation_tables
from megatron_parallel_r1.evaluation.summary import EvaluationSummary
from megatron_parallel_r1.utils.files import write_atomically
from megatron_parallel_r1.utils.hub import is_hub_name

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

BEGIN, END = "<!-- parallel-r1 evaluate: begin -->", "<!-- parallel-r1 evaluate: end -->"
_SECTION = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}\n?", re.DOTALL)


def check_card(place: str) -> None:
    """Checks, before anything is evaluated, that the card can be read and written.

    Args:
        place: a model's folder, or its name on the Hub, `owner/name`.

    Raises:
        UserError: there is no card, or no token for the Hub.
    """
    from huggingface_hub import get_token

    if is_hub_name(place) and get_token() is None:
        raise UserError(
            f"--card {place}: no token for the Hugging Face Hub; set HF_TOKEN to one that may write"
        )
    _load(place)


def add_to_card(summaries: Sequence[EvaluationSummary], place: str) -> None:
    """Replaces the figures of earlier evaluations of the same benchmarks and modes, and keeps all others.

    Args:
        summaries: of one checkpoint; their table is the only one of its kind in the card.
        place: as for `check_card`.

    Raises:
        UserError: the card cannot be read or written.
    """
    card = _load(place)
    accuracy, _ = evaluation_tables(summaries)
    card.text = _with_section(
        card.text, f"## Evaluated with parallel-r1\n\n{accuracy.lead}\n\n{accuracy.markdown()}"
    )
    data = cast("ModelCardData", card.data)
    data.model_name = data.model_name or Path(place).name
    fresh = [_metadata(summary) for summary in summaries]
    replaced = {(result.dataset_type, result.metric_config) for result in fresh}
    earlier = data.eval_results or ()
    kept = [result for result in earlier if (result.dataset_type, result.metric_config) not in replaced]
    data.eval_results = [*kept, *fresh]
    if not is_hub_name(place):
        write_atomically(Path(place) / "README.md", str(card))
        return
    try:
        card.push_to_hub(place, commit_message="Add evaluation results")
    except Exception as error:  # the library and its HTTP client raise many types
        raise UserError(
            f"--card {place}: the Hub refuses the card ({one_line(error)}); check HF_TOKEN"
        ) from None


def _with_section(text: str, section: str) -> str:
    """Returns the card's text with the section in place of the last one, or at its end."""
    block = f"{BEGIN}\n{section}\n{END}\n"
    if _SECTION.search(text):
        return _SECTION.sub(lambda _: block, text, count=1)
    return f"{text.rstrip()}\n\n{block}"


def _load(place: str) -> ModelCard:
    from huggingface_hub import ModelCard

    file = Path(place) / "README.md"
    if not is_hub_name(place) and not file.is_file():
        raise UserError(f"--card {place}: no README.md there; give a release's folder, or a name on the Hub")
    try:
        return ModelCard.load(place if is_hub_name(place) else file, ignore_metadata_errors=True)
    except Exception as error:  # the library, its HTTP client and the card's YAML raise many types
        raise UserError(f"--card {place}: the model card cannot be read ({one_line(error)})") from None


def _metadata(summary: EvaluationSummary) -> EvalResult:
    from huggingface_hub import EvalResult

    published = PUBLISHED.get(summary.benchmark)
    metric = f"maj@{summary.votes}" if summary.mode.startswith("majority") else f"mean@{summary.samples}"
    reach = f"95 % in [{100 * summary.score.low:.1f}, {100 * summary.score.high:.1f}]"
    return EvalResult(
        task_type="text-generation",
        dataset_type=published.name if published else summary.benchmark,
        dataset_name=summary.benchmark,
        metric_type="accuracy",
        metric_value=round(100 * summary.score.value, 2),
        metric_name=f"{metric}, {summary.mode} ({summary.problems} problems, {reach})",
        metric_config=summary.mode,
    )
