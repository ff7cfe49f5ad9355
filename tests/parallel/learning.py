"""Three steps of the real `Learner` under a parallel layout, from traces to weights; see steps.py."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.config.objective import Objective
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import hf_tensors, load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.rewards.path_diversity import content_span
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.expert_exchange import fetch_experts
from megatron_parallel_r1.rl.learner import BatchConfig, Learner
from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.rl.path_results import PathVerdicts, judge_paths
from megatron_parallel_r1.rl.reference import Reference
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.train.logprob_runner import causal_logprobs
from megatron_parallel_r1.train.trainer import Adam, Trainer
from megatron_parallel_r1.utils.rank import is_rank_zero
from tests.reference.traces import TAGS, random_trace
from tests.unit.rl.steps import gathered, learn

# Not below the longest row, and a multiple of 8, the most parts that a layout here cuts a row into.
MICRO_TOKENS = 240


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is learned from: the traces of some seeds, in groups of `samples`."""

    objective: Objective
    seeds: Sequence[int]
    samples: int


LESSONS = {
    "kl in the reward": Lesson(Objective(kl="k3", kl_in="reward", mask_truncated=True), range(24), 4),
    # Fewer traces than copies of the model: all but one have nothing to do. A trace alone in its group learns
    # only from what its paths were credited with, and from the KL term.
    "path credit": Lesson(Objective(kl="k3", kl_coefficient=0.2, path_credit=True), [3], 1),
}


def with_experts(trace: Trace, seed: int, shape: ModelConfig) -> Trace:
    """The trace as if an engine had chosen experts for all but its last token, in a mixture of experts."""
    if shape.experts is None:
        return trace
    size = (len(trace.prompt) + len(trace.tokens) - 1, shape.layers, shape.experts.count)
    order_TXE = np.random.default_rng(seed).random(size).argsort(-1).astype(np.int16)
    return replace(trace, experts=order_TXE[..., : shape.experts.per_token].tobytes())


def trace_of(seed: int) -> Trace:
    """A random trace, every fifth one cut; some tokens suppressed, the engine's log-probs around ln(1/41)."""
    cut = seed % 5 == 0
    tokens = random_trace(seed, depth=2, truncate=cut)
    tree = parse(tokens, TAGS)
    forced, rng = tree.forced(), random.Random(seed)
    sampled = [index not in forced for index in range(len(tokens))]
    drawn = list(zip(tokens, sampled, strict=True))
    return Trace(
        prompt=(20, 21, 22),
        tokens=tuple(tokens),
        sampled=tuple(sampled),
        suppressed=tuple(
            is_sampled and token != TAGS.parallel and rng.random() < 0.2 for token, is_sampled in drawn
        ),
        logprobs=tuple(rng.random() - 4.2 if is_sampled else 0.0 for is_sampled in sampled),
        finish="length" if cut else "eos",
        tree=tree,
    )


class Numbers:
    """A tokenizer that writes each token as its number."""

    eos_token_id = TAGS.eos

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


def last_word(text: str) -> str | None:
    return text.split()[-1] if text else None


def verdicts_of(traces: Sequence[Trace], verifier: Verifier) -> list[PathVerdicts]:
    """Every path states its last token; to the first problem odd ones are right, to the next even ones.

    The copies of the model share the work: what they put together is as if each trace had been read alone.
    """
    answers = [tuple(str(token) for token in range(41) if (token + i) % 2) for i in range(len(traces))]
    problems = [Problem(str(i), "?", right, "made up") for i, right in enumerate(answers)]
    judged = judge_paths(
        [PackedTrace.of(trace) for trace in traces], problems, Numbers(), verifier, last_word
    )
    for trace, right, verdicts in zip(traces, answers, judged, strict=True):
        paths = [[slice(*content_span(path)) for path in block.paths] for _, block in trace.tree.all_blocks()]
        read = [[last_word(" ".join(map(str, trace.tokens[path]))) for path in block] for block in paths]
        assert verdicts == [[None if own is None else own in right for own in block] for block in read]
    return judged


def three_lessons(shape: ModelConfig, parallel: ParallelConfig, lesson: Lesson) -> dict[str, Any]:
    """Metrics of three steps, as the learner returns them, and the weights that they end in.

    `probed` are the log-probs of three texts, summed up, under the weights of the end.
    """
    model, other = build_model(shape, torch.float32, parallel), build_model(shape, torch.float32, parallel)
    load_hf_tensors(model, random_hf_tensors(shape, seed=7, std=0.2))
    load_hf_tensors(other, random_hf_tensors(shape, seed=8, std=0.2))
    # eps: as in steps.py.
    trainer = Trainer(model, Adam(lr=1e-3, eps=1e-6, weight_decay=0.1))
    batch = BatchConfig(lesson.samples, 1, mini_batches=2, micro_tokens=MICRO_TOKENS, max_response_tokens=160)
    learner = Learner(trainer, lesson.objective, batch, "isolated", TAGS, Reference(other, 1.0))
    traces = [with_experts(trace_of(seed), seed, shape) for seed in lesson.seeds]
    # Rank zero writes all of them into a checkpoint.
    written = fetch_experts(gathered(traces), range(len(traces)) if is_rank_zero() else ())
    chosen = {i: trace.experts for i, trace in enumerate(traces) if trace.experts}
    assert written == (chosen if is_rank_zero() else {})
    rewards = [random.Random(seed).choice([1.0, -1.0]) for seed in lesson.seeds]
    with Verifier() as verifier:
        verdicts = verdicts_of(traces, verifier)
    steps = [learn(learner, traces, rewards, 1e-3, verdicts) for _ in range(3)]
    probed = causal_logprobs(
        trainer, [trace.tokens for trace in traces[:3]] * (3 // len(traces[:3])), MICRO_TOKENS
    )
    return {
        **{name: [step[name] for step in steps] for name in steps[0]},
        "probed": [math.fsum(logprobs) for logprobs in probed],
        "weights": {name: weight.float().clone() for name, weight in hf_tensors(model)},
    }
