"""The distill loop: problems -> own traces -> verdicts -> checks -> a data set for SFT.

Rejection sampling, as NPR (arXiv 2512.07461) and ThreadWeaver (arXiv 2512.07843) distil a model's own
traces. Nothing is trained.

<stage>/sampled.jsonl    every trace with its verdict: a restarted stage resumes behind its last whole step
        traces.parquet   the traces that pass, balanced, in the format of Parallel-GSM8K
        report.md, report.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_parallel_r1.coldstart.balance import Candidate, balance
from megatron_parallel_r1.coldstart.checks import (
    Checked,
    Rejection,
    TraceShape,
    check_answer,
    check_form,
)
from megatron_parallel_r1.coldstart.report import (
    CheckedSample,
    ShapeCounts,
    Tally,
    shape_lines,
    tally_lines,
)
from megatron_parallel_r1.coldstart.run import write_traces
from megatron_parallel_r1.coldstart.teacher import TeacherAnswer
from megatron_parallel_r1.config.recipe import TRACES
from megatron_parallel_r1.config.stages import DistillStage
from megatron_parallel_r1.data.cells import as_value, at_path
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import decode, template_columns
from megatron_parallel_r1.distributed.collectives import all_gather_objects, run_on_rank_zero
from megatron_parallel_r1.distributed.watchdog import Watchdog
from megatron_parallel_r1.errors import Stopped, UserError
from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.metrics import trace_metrics
from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.rl.rollout_worker import sample_and_verify
from megatron_parallel_r1.rollout.thinking import Thinker
from megatron_parallel_r1.run.backends import Backends
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.run.datasets import problem_stream
from megatron_parallel_r1.run.folder import SAMPLED, steps_done
from megatron_parallel_r1.run.stage_log import StageLog
from megatron_parallel_r1.utils.exit import stop_signal_pending
from megatron_parallel_r1.utils.files import write_atomically
from megatron_parallel_r1.utils.interrupts import interrupts_recorded
from megatron_parallel_r1.utils.jsonl import JsonlWriter, JsonRecord, read_jsonl
from megatron_parallel_r1.utils.rank import is_rank_zero
from megatron_parallel_r1.utils.seeding import seed_series
from megatron_parallel_r1.utils.tables import markdown_table
from megatron_parallel_r1.utils.timers import Timers


def distill(
    run: RunContext, stage: DistillStage, verifier: Verifier, backends: Backends, watchdog: Watchdog
) -> None:
    """Samples the stage's traces with the weights that it starts from, and writes those that pass.

    Raises:
        Stopped: a rank received a stop signal; every whole step is kept.
        UserError: no trace passes.
    """
    recipe, folder, timers = run.recipe, run.stage_folder(stage.name), Timers()
    problems = problem_stream(recipe, stage, run.seed_of(stage.name, "data"), run.prompt_tokens)
    done = run_on_rank_zero(lambda: steps_done(run.folder, stage) if run.resumes else 0)
    problems.restore({"position": done * stage.prompts_per_step})
    model, thinking = run.model(stage), recipe.thinking_of(stage)
    with (
        backends.open(model, thinking, version=0) as backend,
        StageLog(recipe, stage, folder, done, run.exporter, run.resumes) as log,
        JsonlWriter(folder / SAMPLED, through=done) if is_rank_zero() else nullcontext() as sampled,
        interrupts_recorded(),
    ):
        backend.engine.load_weights(hf_tensors(model), version=0)
        thinker = Thinker(backend.engine, run.tags, thinking)
        for step in range(done + 1, stage.steps + 1):
            if any(all_gather_objects(stop_signal_pending())):
                raise Stopped(f"stage {stage.name}: stopped by a signal after step {step - 1}, saved")
            watchdog.set_location(f"stage {stage.name}, step {step}")
            new = problems.next_batch(stage.prompts_per_step)
            batch = [problem for problem in new for _ in range(stage.samples_per_prompt)]
            seeds = seed_series(len(batch), run.seed_of(stage.name, "rollout"), step)
            traces, judged = sample_and_verify(
                thinker,
                batch,
                seeds,
                run.tokenizer,
                recipe.prompt_template,
                verifier,
                stage.max_concurrent_rollouts,
                timers=timers,
            )
            metrics = {
                **trace_metrics([trace.outline for trace in traces], judged),
                "tokens": sum(trace.outline.length for trace in traces),
                **timers.take(),
                **backend.metrics(),
            }
            if sampled is not None:
                checked = [
                    _check(run, stage, trace, verdict, problem)
                    for trace, verdict, problem in zip(traces, judged, batch, strict=True)
                ]
                for problem, each in zip(batch, checked, strict=True):
                    sampled.write(_record(run, step, problem, each))
                log.step(step, metrics | {"kept": fmean(each.kept for each in checked)})
    run_on_rank_zero(lambda: _write(run, stage, folder))


def _check(
    run: RunContext, stage: DistillStage, trace: PackedTrace, judged: Judged, problem: Problem
) -> Checked:
    text = decode(run.tokenizer, trace.column("tokens").tolist())
    answer = TeacherAnswer(text, "stop" if trace.outline.finish == "eos" else "length")
    checked, written = check_form(answer, stage.check, run.tags.format)
    return checked if written is None else check_answer(checked, judged, written, problem)


def _record(run: RunContext, step: int, problem: Problem, checked: Checked) -> JsonRecord:
    shown = template_columns(run.recipe.prompt_template)
    return {
        "step": step,
        "question": problem.prompt,
        "answer": problem.answer,
        "columns": {name: at_path(name, as_value)(problem.columns) for name in shown},
        "response": checked.text,
        "paths": checked.shape.paths,
        "rejection": None if checked.rejection is None else asdict(checked.rejection),
    }


def _write(run: RunContext, stage: DistillStage, folder: Path) -> None:
    """Balances what passed and writes the data set and its report."""
    records = read_jsonl(folder / SAMPLED)
    numbers: dict[tuple[str, str], int] = {}
    samples, candidates, kept = [], [], dict[tuple[int, int], JsonRecord]()
    for number, (record, checked) in enumerate(_without_repeats(records)):
        problem = numbers.setdefault((record["question"], record["answer"]), len(numbers))
        samples.append(CheckedSample(str(problem), number, checked))
        if checked.kept:
            candidates.append(Candidate(problem, number, checked.shape))
            kept[problem, number] = record
    chosen = balance(candidates, stage.balance, run.seed_of(stage.name, "balance"))
    tally = Tally.of(samples, stage.shown, run.recipe.seed)
    passed, written = (ShapeCounts.of(each.shape for each in part) for part in (candidates, chosen))
    counts = {
        "problems": len(numbers),
        "problems with a trace that passes": len({each.problem for each in candidates}),
        "traces sampled": tally.answers,
        "traces that pass": tally.passed,
        "traces written": written.traces,
    }
    lines = [f"# {stage.name}", "", markdown_table(("", "count"), list(counts.items())), ""]
    lines += [*tally_lines(tally), "## Blocks and paths", "", *shape_lines(passed, written)]
    write_atomically(folder / "report.md", "\n".join(lines).rstrip() + "\n")
    report = {"counts": counts, "tally": asdict(tally), "passed": asdict(passed), "written": asdict(written)}
    write_atomically(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if not chosen:
        raise UserError(f"stage {stage.name}: no trace passes; see {folder / 'report.md'} for why")
    shown = template_columns(run.recipe.prompt_template)
    rows = []
    for each in chosen:
        record = kept[each.problem, each.sample]
        rows.append({name: record[name] for name in ("question", "response", "answer")} | record["columns"])
    write_traces(folder / TRACES, rows, shown)


def _without_repeats(records: Sequence[JsonRecord]) -> Iterator[tuple[JsonRecord, Checked]]:
    """Yields the records with their checks, in which a trace that its problem has already is rejected."""
    seen: set[tuple[Any, ...]] = set()
    for record in records:
        shape = TraceShape(tuple(record["paths"]))
        rejection = None if record["rejection"] is None else Rejection(**record["rejection"])
        key = (record["question"], record["answer"], record["response"])
        if rejection is None and key in seen:
            rejection = Rejection("repeated")
        seen.add(key)
        yield record, Checked(record["response"], rejection, shape)
