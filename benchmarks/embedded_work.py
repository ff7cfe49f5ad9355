"""Rollouts of the embedded model with known, varied lengths, and the same work as plain sequences."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.paced import Pace, Paced
from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.data.embedded.generate import build_tokenizer, training_problem
from megatron_parallel_r1.model.weights import random_hf_tensors
from megatron_parallel_r1.rollout.engine import Completion, Sampling
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.native.page_table import NativeContext
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.tokenizer import add_tags
from megatron_parallel_r1.thought.trace import Trace

Sequence_ = tuple[list[int], int]  # prompt token ids, number of tokens to sample


class Varied(Paced):
    """Samples 0.5 to 1.5 times the pace's tokens in each segment, determined by the sampling seed."""

    async def sample(
        self,
        context: NativeContext,
        sampling: Sampling,
        limit: int,
        stop: frozenset[int],
        suppress: frozenset[int],
    ) -> Completion:
        pace, share = self._pace, 0.5 + sampling.seed % 1000 / 999
        varied = Pace(*(max(2, round(share * count)) for count in (pace.main, pace.path, pace.summary)))
        paced = Paced(self._engine, self._tags, varied)
        return await paced.sample(context, sampling, limit, stop, suppress)


@dataclass(frozen=True, slots=True)
class Flat:
    """A trace with one block as independent sequences that share no cache.

    Attributes:
        main: the tokens up to `<Parallel>`.
        paths: from `<Path>` to `</Path>`.
        rest: from `<Summary>` to the end.
    """

    main: Sequence_
    paths: list[Sequence_]
    rest: Sequence_

    @property
    def drawn(self) -> int:
        return sum(count for _, count in (self.main, *self.paths, self.rest))


class EmbeddedWork:
    """The demo's model with random weights, and prompts of its problems."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()
        self.tags: Tags = add_tags(self.tokenizer)
        self.shape = ModelConfig(
            128, 2, 4, 2, 32, 512, vocab=len(self.tokenizer), rope_theta=1e3, max_positions=1024
        )
        self.tensors: dict[str, torch.Tensor] = dict(random_hf_tensors(self.shape, seed=0, std=0.08))

    def engine(self) -> NativeEngine:
        engine = NativeEngine(self.shape)
        engine.load_weights(self.tensors.items(), version=0)
        return engine

    def prompts(self, count: int) -> list[list[int]]:
        questions = (training_problem("easy", 5, index).prompt for index in range(count))
        return [self.tokenizer(question)["input_ids"] for question in questions]

    def traces(
        self, engine: NativeEngine, pace: Pace, paths: int, prompts: Sequence[Sequence[int]], varied: bool
    ) -> list[Trace]:
        """Generates one trace with one block per prompt, all concurrently."""
        thinking = Thinking(paths=paths, max_blocks=1, max_path_tokens=900, max_response_tokens=8000)
        paced = (Varied if varied else Paced)(engine, self.tags, pace)
        thinker = Thinker(paced, self.tags, thinking)
        return asyncio.run(roll_out(thinker, prompts, range(len(prompts)), concurrent=len(prompts)))


def flattened(trace: Trace) -> Flat:
    """The sequences that sample the same tokens; forced tokens are part of their prompts."""
    ((_, block),) = trace.tree.all_blocks()
    prompt, tokens = list(trace.prompt), list(trace.tokens)
    opened = block.paths[0].start
    before = prompt + tokens[:opened]
    rest = block.paths[-1].stop + 2
    return Flat(
        (prompt, opened),
        [(before + tokens[path.start : path.start + 1], path.stop - path.start - 1) for path in block.paths],
        (prompt + tokens[:rest], len(tokens) - rest),
    )
