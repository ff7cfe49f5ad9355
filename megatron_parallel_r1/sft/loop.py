"""The SFT loop: worked examples -> packed rows -> loss -> new weights.

Examples are trained under the layout of their later rollout. Only tokens that the policy will sample carry
loss; tags that an engine forces do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from megatron_parallel_r1.config.stages import SftStage
from megatron_parallel_r1.data.problems import Example
from megatron_parallel_r1.data.prompts import encode_prompt, encode_response
from megatron_parallel_r1.data.row_cache import RowCache, tokenizer_hash
from megatron_parallel_r1.data.sampler import ProblemStream
from megatron_parallel_r1.distributed.collectives import sum_metrics
from megatron_parallel_r1.distributed.watchdog import Watchdog
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.run.backends import Backends
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.run.datasets import example_rows, held_out_examples
from megatron_parallel_r1.run.guard import SKIPPED
from megatron_parallel_r1.run.stage_loop import Evaluator, StageLoop
from megatron_parallel_r1.thought.layout import Mode, Row, lay_out
from megatron_parallel_r1.thought.parser import ParseError, parse
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.train.micro_batch import MicroBatch, partition_rows
from megatron_parallel_r1.train.trainer import Trainer, Update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train_sft(
    run: RunContext, stage: SftStage, backends: Backends, watchdog: Watchdog, evaluator: Evaluator
) -> Trainer:
    """Trains a supervised stage and returns its trainer."""
    trainer, examples, held_out = run.trainer(stage), example_stream(run, stage), held_out_rows(run, stage)
    micro_tokens, tag_ids = run.recipe.max_tokens_per_micro_batch, run.tags.ids
    engine_at = partial(backends.engine_with, trainer.model, run.recipe.thinking_of(stage))  # for evaluations
    with StageLoop(run, stage, trainer, watchdog, evaluator) as loop:
        loop.restore("stream", examples)
        for step, lr in loop.steps({"stream": examples}, engine_at):
            start = time.monotonic()
            examples.begin_step(step)
            batch = SftBatch(examples.next_batch(stage.examples_per_step))
            metrics = SKIPPED
            with loop.guard.skip_if_not_finite(step, batch):
                update = sft_step(trainer, batch.rows, micro_tokens, lr, tag_ids)
                metrics = {
                    "loss": update.loss,
                    "tag_loss": tag_loss(update.means),
                    "grad_norm": update.grad_norm,
                    "entropy": update.entropy,
                }
            seconds = time.monotonic() - start
            if held_out and (step % stage.held_out_every == 0 or step == stage.steps):
                metrics = metrics | held_out_metrics(trainer, held_out, micro_tokens, tag_ids)
            loop.end(step, metrics | {"lr": lr, "tokens": batch.tokens, "time_s": seconds})
    return trainer


def example_stream(run: RunContext, stage: SftStage) -> ProblemStream[Row]:
    """The laid-out examples of a stage, in its order; raises as `example_rows`."""
    mode = run.recipe.thinking_of(stage).mode
    hashed, template = tokenizer_hash(run.tokenizer), run.recipe.prompt_template
    cache = RowCache(run.recipe.out / ".rows", hashed, template, mode, run.tags)
    return example_rows(run.recipe, stage, run.seed_of(stage.name, "data"), _to_row(run, stage), cache)


def held_out_rows(run: RunContext, stage: SftStage) -> list[Row]:
    """The laid-out examples that the stage does not train on."""
    examples = held_out_examples(run.recipe, stage, run.seed_of(stage.name, "data"))
    most = run.recipe.max_example_tokens
    return [row for row in map(_to_row(run, stage), examples) if most is None or len(row) <= most]


def _to_row(run: RunContext, stage: SftStage) -> Callable[[Example], Row]:
    template, mode = run.recipe.prompt_template, run.recipe.thinking_of(stage).mode
    return partial(example_row, tokenizer=run.tokenizer, tags=run.tags, template=template, mode=mode)


@dataclass(frozen=True, slots=True)
class SftBatch:
    """The laid-out examples of a step, the same on every rank."""

    rows: Sequence[Row]

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    def records(self) -> list[dict[str, Any]]:
        """The batch, JSON-ready, for inspection."""
        return [{"tokens": row.tokens_L.tolist(), "source": row.source_L.tolist()} for row in self.rows]


def example_row(
    example: Example, tokenizer: PreTrainedTokenizerBase, tags: Tags, template: str, mode: Mode
) -> Row:
    """Tokenizes an example and computes its layout.

    Raises:
        UserError: its response is not a well-formed trace.
    """
    problem = example.problem
    tokens = encode_response(tokenizer, example.response, tags.format)
    try:
        tree = parse(tokens, tags, strict=True)
    except ParseError as error:
        raise UserError(
            f"{problem.source}, example {problem.id}: malformed response, {error}; fix or drop the row"
        ) from None
    forced = tree.forced()
    sampled = [index not in forced for index in range(len(tokens))]
    return lay_out(encode_prompt(tokenizer, template, problem), tokens, sampled, tree, mode)


def sft_loss(logprobs_N: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood, summed over targets; the trainer divides by the targets of the update."""
    return -logprobs_N.sum()


def tag_sums(logprobs_N: torch.Tensor, batch: MicroBatch, tag_ids: Sequence[int]) -> dict[str, torch.Tensor]:
    """The negative log-likelihood of the targets that are tags, summed, and their number."""
    is_tag_N = torch.zeros_like(batch.labels_N, dtype=torch.bool)
    for tag in tag_ids:  # neither sent to the device nor a mask that selects: the host would wait
        is_tag_N |= batch.labels_N == tag
    loss = -logprobs_N.detach().where(is_tag_N, 0.0).sum()
    return {"tag_loss": loss, "tags": is_tag_N.sum().to(logprobs_N.dtype)}


def tag_loss(means: Mapping[str, float]) -> float | None:
    """The mean loss of the tags, from their sums or the means of these; None without any."""
    return means["tag_loss"] / means["tags"] if means.get("tags") else None


@torch.no_grad()
def held_out_metrics(
    trainer: Trainer, rows: Sequence[Row], micro_tokens: int, tag_ids: Sequence[int]
) -> dict[str, float | None]:
    """The mean loss of held-out rows, and of their tags; every rank calls it."""
    packed = partition_rows(rows, micro_tokens, trainer.partition)
    batches = [MicroBatch.of(row, trainer.device) for row in packed]
    reports = [
        {
            "loss": sft_loss(logprobs_N),
            "targets": torch.full((), len(logprobs_N), device=trainer.device),
            **tag_sums(logprobs_N, batch, tag_ids),
        }
        # Only the last pipeline stage has log-probs.
        for batch, logprobs_N in zip(batches, trainer.logprobs(batches), strict=False)
    ]
    sums = sum_metrics(reports, trainer.device)
    return {
        "held_out_loss": sums["loss"] / max(1.0, sums["targets"]),
        "held_out_tag_loss": tag_loss(sums),
    }


def sft_step(
    trainer: Trainer, rows: Sequence[Row], micro_tokens: int, lr: float, tag_ids: Sequence[int] = ()
) -> Update:
    """Makes one optimizer step on the mean negative log-likelihood of the rows' targets.

    Args:
        rows: rows of the whole batch, the same on every rank.
        micro_tokens: largest number of tokens of a packed row.
        tag_ids: tokens whose share of the loss is reported (`tag_loss`).
    """
    packed = partition_rows(rows, micro_tokens, trainer.partition)
    micro_batches = [MicroBatch.of(row, trainer.device) for row in packed]

    def loss(
        logprobs_N: torch.Tensor, entropies_N: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return sft_loss(logprobs_N), tag_sums(logprobs_N, batch, tag_ids)

    return trainer.update(micro_batches, loss, lr)
