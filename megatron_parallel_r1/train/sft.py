"""Supervised fine-tuning: worked examples under the layout that their rollout will have.

Only what the policy will have to draw carries loss; the tags that an engine forces do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from megatron_parallel_r1.data.problems import Example
from megatron_parallel_r1.data.prompts import encode_prompt, encode_response
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.layout import Mode, Row, lay_out
from megatron_parallel_r1.thought.parser import ParseError, parse
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.train.micro_batch import MicroBatch
from megatron_parallel_r1.train.partition import share_out
from megatron_parallel_r1.train.trainer import Trainer, Update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def example_row(
    example: Example, tokenizer: PreTrainedTokenizerBase, tags: Tags, template: str, mode: Mode
) -> Row:
    """Lays an example out.

    Raises:
        UserError: its response is no well-formed trace.
    """
    problem = example.problem
    tokens = encode_response(tokenizer, example.response)
    try:
        tree = parse(tokens, tags, strict=True)
    except ParseError as error:
        raise UserError(
            f"{problem.source}, example {problem.id}: malformed response, {error}; mend or drop the row"
        ) from None
    forced = tree.forced()
    sampled = [index not in forced for index in range(len(tokens))]
    return lay_out(encode_prompt(tokenizer, template, problem.prompt), tokens, sampled, tree, mode)


def sft_loss(logprobs_N: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood, summed over targets; the trainer divides by those of the whole update."""
    return -logprobs_N.sum()


def sft_step(trainer: Trainer, rows: Sequence[Row], micro_tokens: int, lr: float) -> Update:
    """One optimizer step on the mean negative log-likelihood of the rows' targets.

    Args:
        rows: of the whole batch, the same on every process.
    """
    mine = share_out(rows, micro_tokens, trainer.place)
    batches = [MicroBatch.of(row, trainer.device) for row in mine]

    def loss(
        logprobs_N: torch.Tensor, entropies_N: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return sft_loss(logprobs_N), {}

    return trainer.update(batches, loss, lr)
