"""Evaluates a checkpoint on benchmarks in one mode: reads cached responses and draws the missing ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from megatron_parallel_r1.data.prompts import encode_prompt, messages_of
from megatron_parallel_r1.data.tokenizers import open_thinking_tokenizer
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.benchmarks import Benchmark
from megatron_parallel_r1.evaluation.checkpoints import Checkpoint, fingerprint
from megatron_parallel_r1.evaluation.engines import EngineSpec, OpenedEngine, engine_opener
from megatron_parallel_r1.evaluation.modes import EvaluationMode, decoding_of
from megatron_parallel_r1.evaluation.records import (
    RecordFolder,
    SampleRequest,
    response_record,
    sample_requests,
)
from megatron_parallel_r1.evaluation.summary import BenchmarkResult, in_order, summarise
from megatron_parallel_r1.report.progress import StageProgress
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """Settings of an evaluation.

    Attributes:
        out: folder of records and tables.
        samples: responses to each problem; None: 1, in majority@k k.
        seed: of all draws.
        settings, prompt: changes to the checkpoint's decoding, as in `decoding_of`.
        concurrent: responses in flight at most, for each copy of the model.
    """

    out: Path
    samples: int | None = None
    seed: int = 0
    settings: tuple[str, ...] = ()
    prompt: str | None = None
    engine: str = "native"
    tensor: int = 1
    servers: tuple[str, ...] = ()
    key_variable: str | None = None
    key_file: Path | None = None
    concurrent: int = 256

    def samples_in(self, mode: EvaluationMode) -> int:
        """Responses to each problem.

        Raises:
            UserError: fewer than one, or not a whole number of votes.
        """
        samples = mode.votes if self.samples is None else self.samples
        if samples < 1 or samples % mode.votes:
            at_least = f"a multiple of {mode.votes}" if mode.votes > 1 else "1 or more"
            raise UserError(f"--samples {samples}: mode {mode} needs {at_least}")
        return samples


def evaluate(
    checkpoint: Checkpoint,
    benchmarks: Sequence[Benchmark],
    mode: EvaluationMode,
    plan: EvaluationPlan,
    console: Console,
) -> list[BenchmarkResult]:
    """Evaluates on each benchmark; draws only responses that are not on disk yet.

    Raises:
        UserError: checkpoint, engine or a setting cannot work.
    """
    opener = engine_opener(plan.engine)
    decoding = decoding_of(mode, checkpoint.decoding, plan.settings, plan.prompt)
    samples = plan.samples_in(mode)
    if decoding.thinking.temperature == 0 and samples > 1:
        raise UserError(f"--samples {samples}: at temperature 0 all of them are the same; set temperature")
    if plan.concurrent < 1:
        raise UserError(f"--concurrent {plan.concurrent}: give 1 or more")
    if checkpoint.source is None:
        console.print(
            f"{checkpoint.folder}: no thinking.json, default settings", soft_wrap=True, highlight=False
        )
    for problem in {problem.source: problem for b in benchmarks for problem in b.problems}.values():
        messages_of(decoding.template, problem)  # the prompt may show columns that a benchmark lacks
    setup = (fingerprint(checkpoint.folder), decoding.record(), plan.engine)
    cache = RecordFolder(plan.out, setup)
    wanted = {
        b.name: sample_requests(b.name, b.problems, samples, plan.seed, setup, decoding.template)
        for b in benchmarks
    }
    records = cache.read()
    # A problem of two benchmarks is drawn once.
    missing = {r.key: r for requests in wanted.values() for r in requests if r.key not in records}
    total = len({r.key for requests in wanted.values() for r in requests})
    label = f"{checkpoint.name} {mode}"
    if len(missing) < total:
        console.print(f"{label}  {total - len(missing)} of {total} responses are cached", highlight=False)
    with Verifier() as verifier:
        if missing:
            tokenizer, tags = open_thinking_tokenizer(checkpoint.folder, decoding.thinking.mode)
            key = plan.key_variable, plan.key_file
            spec = EngineSpec(checkpoint.folder, plan.seed, plan.tensor, plan.servers, *key)
            with opener(spec) as opened:
                try:
                    thinker = Thinker(opened.engine, tags, decoding.thinking)
                except ValueError as error:
                    raise UserError(f"{error}; choose another with --set mode=…") from None
                drawing = _Drawing(thinker, tokenizer, verifier, decoding.template, plan.concurrent)
                drawing.draw(list(missing.values()), opened, cache, label, total, console)
            records = cache.read()
        results = []
        for name, requests in wanted.items():
            grouped = in_order(records, [request.key for request in requests], samples)
            results.append(summarise(checkpoint.name, checkpoint.step, name, mode, grouped, verifier))
        return results


@dataclass(frozen=True, slots=True)
class _Drawing:
    """Draws, verifies and records responses, each as soon as it is complete."""

    thinker: Thinker[Any]
    tokenizer: PreTrainedTokenizerBase
    verifier: Verifier
    template: str
    concurrent: int

    def draw(
        self,
        missing: Sequence[SampleRequest],
        opened: OpenedEngine,
        cache: RecordFolder,
        label: str,
        total: int,
        console: Console,
    ) -> None:
        """Draws this process's share of `missing`: neighbours, so that a copy writes their prompt once."""
        start, stop = (len(missing) * copy // opened.copies for copy in (opened.copy, opened.copy + 1))
        share = missing[start:stop]
        if not opened.is_replica_leader:
            self._roll_out(share, None)
            return
        cached = total - len(missing)
        drawn = right = parallel = 0
        lock = threading.Lock()
        bar = StageProgress(label, cached + len(share), done=cached, console=console)
        with cache.writer(opened.copy) as write, bar:

            def keep(index: int, trace: Trace) -> None:
                nonlocal drawn, right, parallel
                record = response_record(share[index], trace, self.tokenizer, self.verifier)
                with lock:
                    write(record)
                    drawn, right, parallel = drawn + 1, right + record.correct, parallel + (record.blocks > 0)
                    bar.update(
                        cached + drawn, {"accuracy": right / drawn, "parallel_ratio": parallel / drawn}
                    )

            self._roll_out(share, keep)

    def _roll_out(
        self, share: Sequence[SampleRequest], on_trace: Callable[[int, Trace], None] | None
    ) -> None:
        prompts = [encode_prompt(self.tokenizer, self.template, r.problem) for r in share]
        seeds = [request.seed for request in share]
        asyncio.run(roll_out(self.thinker, prompts, seeds, self.concurrent, on_trace=on_trace))
