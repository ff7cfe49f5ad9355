"""Evaluates a stage's weights while it trains, on the sets of `evaluate_during`.

All ranks take part. Responses are records, as of `evaluator.py`, kept below the stage's `.evaluating/` until
all sets of their step are measured: a run that is killed meanwhile draws only what is missing.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from megatron_parallel_r1.config.stages import RlStage, SftStage
from megatron_parallel_r1.data.prompts import template_columns
from megatron_parallel_r1.distributed.collectives import (
    gather_from_replicas,
    is_replica_leader,
    replica_slice,
    run_on_rank_zero,
)
from megatron_parallel_r1.evaluation.evaluator import Drawing, shuffled
from megatron_parallel_r1.evaluation.modes import EvaluationMode
from megatron_parallel_r1.evaluation.records import RecordFolder, ResponseRecord, sample_requests
from megatron_parallel_r1.evaluation.summary import EvaluationSummary, in_order, summarise
from megatron_parallel_r1.report.progress import StageProgress
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rollout.engine import Engine
from megatron_parallel_r1.rollout.thinking import Thinker
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.run.sources import evaluation_problems


@dataclass(frozen=True, slots=True)
class StageEvaluator:
    """The evaluations of one stage; `run/stage_loop.py` decides when."""

    run: RunContext
    stage: SftStage | RlStage
    verifier: Verifier

    def forget_all_but(self, step: int | None) -> None:
        """Deletes responses of other steps; the weights of those after a checkpoint are trained anew."""
        scratch = self._scratch(0).parent

        def delete() -> None:
            kept = set() if step is None else {self._scratch(step)}
            for folder in set(scratch.glob("step_*")) - kept:
                shutil.rmtree(folder, ignore_errors=True)
            if scratch.is_dir() and not any(scratch.iterdir()):
                scratch.rmdir()

        run_on_rank_zero(delete)

    def _scratch(self, step: int) -> Path:
        return self.run.stage_folder(self.stage.name) / ".evaluating" / f"step_{step:06d}"

    def measure(
        self, step: int, name: str, mode: str, engine: Engine[Any], progress: StageProgress
    ) -> dict[str, Any]:
        """Draws and verifies the responses to a set in a mode; returns their record.

        Every response has the seed that it has at the stage's other steps, so that these are paired.

        Raises:
            UserError: the engine is lost, or a file cannot be written.
        """
        began = time.monotonic()
        run, settings = self.run, self.stage.evaluation_sets[name]
        decoding = run.recipe.decoding_of(self.stage, settings, mode)
        fields, samples = template_columns(run.recipe.prompt_template), settings.samples_per_problem
        problems = evaluation_problems(settings.data, settings.problems, fields)
        setup = (self.stage.name, step, decoding.record())
        seed, template = run.seed_of("evaluation"), decoding.template
        requests = sample_requests(name, problems, samples, seed, setup, template)
        cache, keys = RecordFolder(self._scratch(step), setup), [request.key for request in requests]
        found = run_on_rank_zero(cache.read)
        thinker = Thinker(engine, run.tags, decoding.thinking)
        most = settings.max_concurrent_rollouts
        drawing = Drawing(thinker, run.tokenizer, self.verifier, template, most)
        share = replica_slice(shuffled(requests))

        done = sum(request.key in found for request in share)

        def work() -> list[ResponseRecord]:
            fresh: list[ResponseRecord] = []
            if not is_replica_leader():
                if engine.runs_on_all_ranks:
                    drawing.take_part(share, found)
                return fresh

            with (
                cache.writer(parallel_state.get_data_parallel_rank()) as write,
                progress.part(f"{name} {mode}", len(share), done) as bar,
            ):

                def keep(record: ResponseRecord) -> None:
                    write(record)
                    fresh.append(record)

                drawing.draw(share, found, keep, bar)
            return fresh

        records = found | {record.key: record for record in gather_from_replicas(work)}

        def summary() -> EvaluationSummary:
            grouped = in_order(records, keys, samples)
            checkpoint, which = self.stage.name, EvaluationMode.of(mode)
            return summarise(checkpoint, step, name, which, grouped, self.verifier).summary

        figures = run_on_rank_zero(summary)
        return {
            "kind": "evaluation",
            "stage": self.stage.name,
            "step": step,
            "set": name,
            **_figures(figures),
            "time_s": time.monotonic() - began,
        }


def _figures(summary: EvaluationSummary) -> dict[str, Any]:
    """The figures of a record, named as in the other records of a run."""
    return {
        "mode": summary.mode,
        "accuracy": summary.score.value,
        "accuracy_low": summary.score.low,
        "accuracy_high": summary.score.high,
        "problems": summary.problems,
        "samples": summary.samples,
        f"mean@{summary.samples}": summary.mean.value,
        **{f"pass@{k}": interval.value for k, interval in summary.passes.items() if k > 1},
        **({f"maj@{summary.votes}": summary.majority.value} if summary.votes > 1 else {}),
        "parallel_ratio": summary.parallel_ratio,
        "blocks_per_trace": summary.blocks_per_response,
        "well_formed_blocks": summary.well_formed,
        "paths_per_block": summary.paths_per_block,
        "length": summary.tokens,
        "critical_length": summary.critical_tokens,
        "saved": summary.saved,
        "first_block": summary.first_block,
        "truncated": summary.truncated,
        "unanswered": summary.unanswered,
    }
