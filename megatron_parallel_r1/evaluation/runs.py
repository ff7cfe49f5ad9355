"""One checkpoint on some benchmarks in one mode: what the cache lacks is drawn, the rest is read."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from megatron_parallel_r1.data.tokenizers import open_tokenizer
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.benchmarks import Benchmark
from megatron_parallel_r1.evaluation.checkpoints import Checkpoint, fingerprint, read_tags
from megatron_parallel_r1.evaluation.decode import draw, judged_record, prompt_tokens
from megatron_parallel_r1.evaluation.engines import EngineRequest, Opened, engine_opener
from megatron_parallel_r1.evaluation.modes import Decoding, Mode, decoding_of
from megatron_parallel_r1.evaluation.records import Attempt, RecordFolder, attempts
from megatron_parallel_r1.evaluation.statistics import Scores
from megatron_parallel_r1.evaluation.summary import Summary, in_order, summarise
from megatron_parallel_r1.report.progress import StageProgress
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rollout.thinking import Thinker
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Plan:
    """How to evaluate.

    Attributes:
        samples: responses to each problem; None: 1, in majority@k k.
        seed: of all draws, and of the bootstrap.
        settings, prompt: what differs from the checkpoint's own decoding, as in `decoding_of`.
        concurrent: responses in flight at most, of one copy of the model.
        out: the folder of records and tables.
    """

    out: Path
    samples: int | None = None
    seed: int = 0
    settings: tuple[str, ...] = ()
    prompt: str | None = None
    engine: str = "native"
    tensor: int = 1
    servers: tuple[str, ...] = ()
    concurrent: int = 256

    def samples_in(self, mode: Mode) -> int:
        """Responses to each problem.

        Raises:
            UserError: less than one, or no whole number of votes.
        """
        samples = mode.votes if self.samples is None else self.samples
        if samples < 1 or samples % mode.votes:
            at_least = f"a multiple of {mode.votes}" if mode.votes > 1 else "1 or more"
            raise UserError(f"--samples {samples}: mode {mode} needs {at_least}")
        return samples


@dataclass(frozen=True, slots=True)
class Result:
    """One benchmark's figures, and the headline score of each problem for paired tests."""

    summary: Summary
    scores: Scores


def evaluate(
    checkpoint: Checkpoint, benchmarks: Sequence[Benchmark], mode: Mode, plan: Plan, console: Console
) -> list[Result]:
    """Evaluates on each benchmark. Started again after a kill, it draws only what is not on disk yet.

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
    if checkpoint.told is None:
        console.print(
            f"{checkpoint.folder}: no thinking.json, default settings", soft_wrap=True, highlight=False
        )
    setup = (fingerprint(checkpoint.folder), decoding.record(), plan.engine)
    kept = RecordFolder(plan.out, setup)
    asked = {b.name: attempts(b.name, b.problems, samples, plan.seed, setup) for b in benchmarks}
    found = kept.read()
    # A question that two benchmarks share is drawn once.
    missing = {a.key: a for each in asked.values() for a in each if a.key not in found}
    total = len({a.key for each in asked.values() for a in each})
    label = f"{checkpoint.name} {mode}"
    if len(missing) < total:
        console.print(f"{label}  {total - len(missing)} of {total} responses are cached", highlight=False)
    with Verifier() as verifier:
        if missing:
            tokenizer = open_tokenizer(checkpoint.folder)
            tags = read_tags(tokenizer, checkpoint.folder)
            request = EngineRequest(checkpoint.folder, plan.seed, plan.tensor, plan.servers)
            with opener(request) as opened:
                thinker = _thinker(opened, tags, decoding)
                work = _Work(thinker, tokenizer, verifier, decoding.template, kept, label, total, console)
                work.do(list(missing.values()), opened, plan.concurrent)
            found = kept.read()
        return [
            Result(
                *summarise(
                    checkpoint.name,
                    checkpoint.step,
                    name,
                    mode,
                    in_order(found, [attempt.key for attempt in each], samples),
                    verifier,
                    plan.seed,
                )
            )
            for name, each in asked.items()
        ]


def write_summaries(results: Sequence[Result], file: Path) -> None:
    """The figures as JSON, for whoever wants to go on with them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    told = [result.summary.record() for result in results]
    file.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(slots=True)
class _Work:
    """The responses that are still missing, drawn, judged, kept and counted."""

    thinker: Thinker
    tokenizer: PreTrainedTokenizerBase
    verifier: Verifier
    template: str
    kept: RecordFolder
    label: str
    total: int
    console: Console

    def do(self, missing: Sequence[Attempt], opened: Opened, concurrent: int) -> None:
        """This process's part of `missing`: neighbours, so that a copy writes their prompt once."""
        mine = missing[
            len(missing) * opened.copy // opened.copies : len(missing) * (opened.copy + 1) // opened.copies
        ]
        if not opened.is_replica_leader:
            asyncio.run(self._draw(mine, concurrent, lambda attempt, trace: None))
            return
        done = self.total - len(missing)
        right = parallel = 0
        lock = threading.Lock()
        bar = StageProgress(self.label, done + len(mine), done=done, console=self.console)
        with self.kept.writer(opened.copy) as writer, bar:

            def keep(attempt: Attempt, trace: Trace) -> None:
                nonlocal done, right, parallel
                record = judged_record(attempt, trace, self.tokenizer, self.verifier)
                with lock:
                    writer.write(record)
                    done, right, parallel = done + 1, right + record.correct, parallel + (record.blocks > 0)
                    drawn = done - (self.total - len(missing))
                    bar.update(done, {"accuracy": right / drawn, "parallel_ratio": parallel / drawn})

            asyncio.run(self._draw(mine, concurrent, keep))

    async def _draw(self, mine: Sequence[Attempt], concurrent: int, keep) -> None:
        prompts = [prompt_tokens(self.tokenizer, self.template, a.problem.prompt) for a in mine]
        await draw(self.thinker, mine, prompts, concurrent, keep)


def _thinker(opened: Opened, tags: Tags, decoding: Decoding) -> Thinker:
    try:
        return Thinker(opened.engine, tags, decoding.thinking)
    except ValueError as error:
        raise UserError(f"{error}; choose another with --set mode=…") from None
