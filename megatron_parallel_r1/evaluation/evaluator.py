"""Evaluates a checkpoint on benchmarks in one mode: reads cached responses and draws the missing ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from megatron_parallel_r1.data.prompts import encode_prompt, messages_of
from megatron_parallel_r1.data.tokenizers import open_thinking_tokenizer
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.benchmarks import Benchmark
from megatron_parallel_r1.evaluation.checkpoints import Checkpoint, fingerprint
from megatron_parallel_r1.evaluation.engines import EngineSpec, engine_opener
from megatron_parallel_r1.evaluation.modes import EvaluationMode, decoding_of
from megatron_parallel_r1.evaluation.records import (
    RecordFolder,
    ResponseRecord,
    SampleRequest,
    response_record,
    sample_requests,
)
from megatron_parallel_r1.evaluation.summary import BenchmarkResult, in_order, summarise
from megatron_parallel_r1.report.progress import StageProgress
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.utils.seeding import hash_seed

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
    everything = shuffled(request for requests in wanted.values() for request in requests)
    missing = sum(request.key not in records for request in everything)
    label = f"{checkpoint.name} {mode}"
    if missing < len(everything):
        cached = len(everything) - missing
        console.print(f"{label}  {cached} of {len(everything)} responses are cached", highlight=False)
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
                drawing = Drawing(thinker, tokenizer, verifier, decoding.template, plan.concurrent)
                first, last = (
                    len(everything) * copy // opened.copies for copy in (opened.copy, opened.copy + 1)
                )
                share = everything[first:last]
                if opened.is_replica_leader:
                    done = sum(request.key in records for request in share)
                    with (
                        cache.writer(opened.copy) as write,
                        StageProgress(label, len(share), done=done, console=console) as bar,
                    ):
                        drawing.draw(share, records, write, bar)
                else:
                    drawing.take_part(share, records)
            records = cache.read()
        results = []
        for name, requests in wanted.items():
            grouped = in_order(records, [request.key for request in requests], samples)
            results.append(summarise(checkpoint.name, checkpoint.step, name, mode, grouped, verifier))
        return results


@dataclass(frozen=True, slots=True)
class Drawing:
    """Draws and verifies responses, each as soon as it is complete."""

    thinker: Thinker[Any]
    tokenizer: PreTrainedTokenizerBase
    verifier: Verifier
    template: str
    concurrent: int

    def draw(
        self,
        share: Sequence[SampleRequest],
        finished: Mapping[str, ResponseRecord],
        write: Callable[[ResponseRecord], None],
        bar: StageProgress,
    ) -> None:
        """Draws what is missing of one replica's share; its leader calls it.

        Args:
            share: in the order of `shuffled`.
            finished: records by key.
            write: keeps a new record; one call at a time.
        """
        running = RunningScore([finished.get(request.key) for request in share])
        places = [place for place, request in enumerate(share) if request.key not in finished]
        missing = [share[place] for place in places]
        lock = threading.Lock()

        def keep(index: int, trace: Trace) -> None:
            record = response_record(missing[index], trace, self.tokenizer, self.verifier)
            with lock:
                write(record)
                bar.update(*running.finish(places[index], record))

        self._roll_out(missing, keep)

    def take_part(self, share: Sequence[SampleRequest], finished: Mapping[str, ResponseRecord]) -> None:
        """Draws the same as the leader of this rank's replica, whose model it shares."""
        self._roll_out([request for request in share if request.key not in finished], None)

    def _roll_out(
        self, share: Sequence[SampleRequest], on_trace: Callable[[int, Trace], None] | None
    ) -> None:
        prompts = [encode_prompt(self.tokenizer, self.template, r.problem) for r in share]
        seeds = [request.seed for request in share]
        asyncio.run(roll_out(self.thinker, prompts, seeds, self.concurrent, on_trace=on_trace))


def shuffled(requests: Iterable[SampleRequest]) -> list[SampleRequest]:
    """Different requests in an order of problems that says nothing about them; samples of one are neighbours.

    A problem whose key stands twice is drawn once.
    """
    different = {request.key: request for request in requests}
    return sorted(different.values(), key=lambda r: (hash_seed(r.identity), r.identity, r.sample))


class RunningScore:
    """Figures of an evaluation under way, over the finished responses that no unfinished one precedes.

    Those that are finished first are the short ones, and mostly right: their accuracy is too high. The first
    n of a shuffled order are a random sample, whatever their lengths.

    Args:
        records: of each response in its shuffled order, None if it is not finished.
    """

    def __init__(self, records: Sequence[ResponseRecord | None]) -> None:
        self._records = list(records)
        self._finished = sum(record is not None for record in records)
        self._counted = self._right = self._parallel = 0

    def finish(self, place: int, record: ResponseRecord) -> tuple[int, dict[str, float | None]]:
        """Adds a response; returns the number of finished ones and the figures of the first `counted`."""
        self._records[place] = record
        self._finished += 1
        while self._counted < len(self._records) and (first := self._records[self._counted]) is not None:
            self._counted += 1
            self._right += first.correct
            self._parallel += first.blocks > 0
        count = self._counted or None
        return self._finished, {
            "accuracy": self._right / count if count else None,
            "parallel_ratio": self._parallel / count if count else None,
            "counted": self._counted,
        }
