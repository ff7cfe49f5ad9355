"""The SFT loop: worked examples -> packed rows -> loss -> new weights.

Examples are trained under the layout of their later rollout. Only tokens that the policy will sample carry
loss; tags that an engine forces do not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from megatron_parallel_r1.config.stages import SftStage
from megatron_parallel_r1.data.problems import Example
from megatron_parallel_r1.data.prompts import encode_prompt, encode_response
from megatron_parallel_r1.data.row_cache import RowCache, tokenizer_hash
from megatron_parallel_r1.data.sampler import ProblemStream
from megatron_parallel_r1.distributed.watchdog import Watchdog
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.run.datasets import example_rows
from megatron_parallel_r1.run.guard import SKIPPED
from megatron_parallel_r1.run.stage_loop import StageLoop
from megatron_parallel_r1.thought.layout import Mode, Row, lay_out
from megatron_parallel_r1.thought.parser import ParseError, parse
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.train.micro_batch import MicroBatch, partition_rows
from megatron_parallel_r1.train.trainer import Trainer, Update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train_sft(run: RunContext, stage: SftStage, watchdog: Watchdog) -> Trainer:
    """Trains a supervised stage and returns its trainer."""
    trainer, examples = run.trainer(stage), example_stream(run, stage)
    with StageLoop(run, stage, trainer, watchdog) as loop:
        loop.restore("stream", examples)
        for step, lr in loop.steps({"stream": examples}):
            start = time.monotonic()
            examples.begin_step(step)
            batch = SftBatch(examples.next_batch(stage.examples_per_step))
            metrics = SKIPPED
            with loop.guard.skip_if_not_finite(step, batch):
                update = sft_step(trainer, batch.rows, run.recipe.max_tokens_per_micro_batch, lr)
                metrics = {"loss": update.loss, "grad_norm": update.grad_norm, "entropy": update.entropy}
            seconds = time.monotonic() - start
            loop.end(step, metrics | {"lr": lr, "tokens": batch.tokens, "time_s": seconds})
    return trainer


def example_stream(run: RunContext, stage: SftStage) -> ProblemStream[Row]:
    """The laid-out examples of a stage, in its order; raises as `example_rows`."""
    template, mode = run.recipe.prompt_template, run.recipe.thinking_of(stage).mode
    return example_rows(
        run.recipe,
        stage,
        run.seed_of(stage.name, "data"),
        to_row=partial(example_row, tokenizer=run.tokenizer, tags=run.tags, template=template, mode=mode),
        cache=RowCache(run.recipe.out / ".rows", tokenizer_hash(run.tokenizer), template, mode),
    )


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
    tokens = encode_response(tokenizer, example.response)
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


def sft_step(trainer: Trainer, rows: Sequence[Row], micro_tokens: int, lr: float) -> Update:
    """Makes one optimizer step on the mean negative log-likelihood of the rows' targets.

    Args:
        rows: rows of the whole batch, the same on every rank.
        micro_tokens: largest number of tokens of a packed row.
    """
    packed = partition_rows(rows, micro_tokens, trainer.partition)
    micro_batches = [MicroBatch.of(row, trainer.device) for row in packed]

    def loss(
        logprobs_N: torch.Tensor, entropies_N: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return sft_loss(logprobs_N), {}

    return trainer.update(micro_batches, loss, lr)
