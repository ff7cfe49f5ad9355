"""Runs a model forward through Megatron's schedule and returns the log-probs of target tokens.

Shapes: L tokens of a row, T of them on this process, N targets of a micro-batch, E hidden size, V rows of the
vocabulary on this process; in a probe T texts of L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_parallel_r1.distributed.collectives import all_gather_objects
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.model.layers import without_fp8
from megatron_parallel_r1.thought.layout import lay_out
from megatron_parallel_r1.thought.tree import Tree
from megatron_parallel_r1.train.micro_batch import BatchPartition, MicroBatch, partition_rows
from megatron_parallel_r1.train.target_logprobs import LogprobQuery, target_logprobs


class LogprobRunner:
    """Computes log-probs under a model's current weights.

    Args:
        temperature: divisor of the logits; the rollout's.
        head_VE: this rank's rows of an output matrix to use instead of the model's.
    """

    def __init__(self, model: Model, temperature: float = 1.0, head_VE: torch.Tensor | None = None) -> None:
        self.model = model
        self.temperature = temperature
        self._head_VE = head_VE
        self._stages: list[torch.nn.Module] = list(model)

    @property
    def partition(self) -> BatchPartition:
        """This rank's place in the partition of a batch."""
        return BatchPartition.of(self.model.config)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def logprobs(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Log-probs of each micro-batch's targets, float32 [N]; empty except on the last pipeline stage."""
        with torch.no_grad():
            return [logprobs_N for logprobs_N, _ in self._run(batches, self._scores, forward_only=True)]

    def _routing(self, batch: MicroBatch) -> torch.Tensor | None:
        """What layers of experts take of a row (model/experts.py); None: the router chooses."""
        return None

    def _run(self, batches: Sequence[MicroBatch], head: Callable[..., Any], forward_only: bool) -> list[Any]:
        """Runs Megatron's schedule; returns the outputs of `head` per micro-batch, on the last stage."""

        def forward(batches: Iterator[MicroBatch], stage: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            batch = next(batches)
            routing = self._routing(batch)
            hidden_T1E = stage(batch.tokens_1L, batch.positions_1L, batch.layout_KL, padding_mask=routing)
            return hidden_T1E, partial(head, batch)

        # Each interleaved stage goes through the micro-batches at its own pace.
        iterators = [iter(batches) for _ in self._stages]
        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._stages,
            num_microbatches=len(batches),
            # The length of the whole row: Megatron divides by the context size.
            seq_length=max(batch.tokens_1L.shape[1] for batch in batches) * self.partition.context_size,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _scores(
        self, batch: MicroBatch, hidden_T1E: torch.Tensor, non_loss_data: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [N] of a micro-batch's targets."""
        last = self.model[-1]
        query = LogprobQuery(
            batch.labels_N, batch.suppressed_N, self.temperature, self.model.architecture.vocab
        )
        head_VE = last.head_weight() if self._head_VE is None else self._head_VE.to(self.device)
        # Its backward is an index_add; that of `[at_N]` sorts, for indices may repeat.
        return target_logprobs(last.whole_hidden(hidden_T1E).index_select(0, batch.at_N), head_VE, query)


def probe_texts(vocabulary: int, count: int = 4, length: int = 48) -> tuple[tuple[int, ...], ...]:
    """Token ids of the probe texts, the same in every run."""
    drawn_TL = np.random.default_rng(0).integers(vocabulary, size=(count, length))
    return tuple(tuple(text) for text in drawn_TL.tolist())


def causal_logprobs(
    runner: LogprobRunner,
    texts: Sequence[Sequence[int]],
    capacity: int,
    world: dist.ProcessGroup | None = None,
) -> list[tuple[float, ...]]:
    """Natural log-probs of `text[1:]` of each text under a causal mask, on every rank.

    All ranks call it; each replica computes all texts. FP8 layers compute in bfloat16 here: what is compared
    with servers are the weights, and FP8's rounding would hide a wrong one.

    Args:
        texts: token ids, at least two per text.
        capacity: tokens of a packed row.
        world: a group of all ranks; None: the default one.
    """
    rows = [lay_out(t[:1], t[1:], [True] * (len(t) - 1), Tree(len(t) - 1, ()), "causal") for t in texts]
    alone = replace(runner.partition, data=0, data_size=1)
    batches = [MicroBatch.of(row, runner.device) for row in partition_rows(rows, capacity, alone)]
    entries: list[tuple[int, int, float]] = []
    with without_fp8(runner.model):
        found = runner.logprobs(batches)
    # Only the last pipeline stage has log-probs, and with context parallelism each rank has part of a row.
    for batch, logprobs_N in zip(batches, found, strict=False):
        at_N = batch.at_N.cpu().numpy()
        segment_ids = [batch.row.segment_ids[place] for place in batch.row.segment_L[at_N]]
        entries += zip(segment_ids, batch.row.source_L[at_N].tolist(), logprobs_N.tolist(), strict=True)
    logprobs = [[float("nan")] * (len(text) - 1) for text in texts]
    for part in all_gather_objects(entries, world):
        for text, index, logprob in part:
            logprobs[text][index] = logprob
    return [tuple(values) for values in logprobs]
