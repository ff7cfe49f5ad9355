"""The tables of a run's evaluations: of its stages, and of a stage over several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from megatron_parallel_r1.evaluation.statistics import wilson_interval
from megatron_parallel_r1.utils.formats import NONE, count, fixed, interval, percent
from megatron_parallel_r1.utils.jsonl import JsonRecord
from megatron_parallel_r1.utils.tables import Column, Table, markdown_table


def accuracy_interval(record: JsonRecord) -> tuple[float, float] | None:
    """The 95 % interval of a record's accuracy; None where the record has none.

    Records before the Wilson interval have only a half width, `ci95`, which is 0 or NaN at 0 %, at 100 % and
    for a single problem; these get their Wilson interval here.
    """
    accuracy, half = record.get("accuracy"), record.get("ci95")
    if accuracy is None or half is None:
        return None
    if "ci95_low" not in record and not half > 0 and record.get("problems"):
        found = wilson_interval(accuracy, record["problems"])
        return found.low, found.high
    low, high = record.get("ci95_low", accuracy - half), record.get("ci95_high", accuracy + half)
    return max(0.0, low), min(1.0, high)


def accuracy_text(record: JsonRecord) -> str:
    """The accuracy with its interval, in percent: `64.2 [60.0, 68.3] %`."""
    bounds = accuracy_interval(record)
    if bounds is None:
        return percent(record.get("accuracy"))
    return f"{interval(record['accuracy'], *bounds)} %"


def _well_formed(record: JsonRecord) -> float | None:
    """None without any block, whatever the record says."""
    return None if record.get("blocks_per_trace") == 0 else record.get("well_formed_blocks")


COLUMNS: tuple[Column[JsonRecord], ...] = (
    Column("stage", "evaluated after this stage", lambda r: str(r["stage"]), is_text=True),
    Column("step", "of that stage", lambda r: f"{r['step']:,}"),
    Column("mode", "decoding mode", lambda r: str(r.get("mode") or NONE), is_text=True),
    Column(
        "accuracy",
        "share of held-out problems with the right final answer, with its 95 % interval",
        accuracy_text,
    ),
    Column(
        "parallel ratio",
        "share of the traces with a parallel block",
        lambda r: percent(r.get("parallel_ratio")),
    ),
    Column(
        "well-formed",
        "share of the blocks with two closed paths or more and a closed summary",
        lambda r: percent(_well_formed(r)),
    ),
    Column("blocks / trace", "mean number of blocks", lambda r: fixed(r.get("blocks_per_trace"), 2)),
    Column("length", "mean tokens of a response", lambda r: fixed(r.get("length"), 1)),
    Column(
        "critical path",
        "mean tokens on the longest chain of a response, which determines its latency",
        lambda r: fixed(r.get("critical_length"), 1),
    ),
    Column(
        "problems",
        "number of problems",
        lambda r: NONE if r.get("problems") is None else count(r["problems"]),
    ),
)


def latest_evals(records: Sequence[JsonRecord]) -> list[JsonRecord]:
    """The last record of each (stage, step, mode), in the order of the first ones."""
    return list({(r["stage"], r["step"], r.get("mode")): r for r in records}.values())


def evaluation_table(records: Sequence[JsonRecord]) -> Table:
    """A row for each evaluation."""
    return Table.of("Evaluation on held-out problems", "", COLUMNS, latest_evals(records))


def seed_table(by_seed: Mapping[int, Sequence[JsonRecord]]) -> str:
    """A Markdown table: for each stage its accuracy by seed, their mean and standard deviation.

    Args:
        by_seed: evaluation records of each seed's run; stages that a seed lacks are left out.
    """
    by_stage = [{record["stage"]: record for record in records} for records in by_seed.values()]
    shared = [stage for stage in by_stage[0] if all(stage in records for records in by_stage)]
    seeds = [f"seed {seed}" for seed in by_seed]
    rows = []
    for records in ([records[stage] for records in by_stage] for stage in shared):
        accuracies = [record["accuracy"] for record in records]
        spread = f" ± {stdev(accuracies):.1%}" if len(accuracies) > 1 else ""
        rows.append(
            [
                records[0]["stage"],
                records[0]["mode"],
                *(f"{accuracy:.1%}" for accuracy in accuracies),
                f"{fmean(accuracies):.1%}{spread}",
                f"{fmean(record['critical_length'] for record in records):.1f}",
                f"{fmean(record['length'] for record in records):.1f}",
            ]
        )
    titles = ["stage", "mode", *seeds, "mean ± sd", "critical path", "length"]
    return markdown_table(titles, rows, "ll" + "r" * (len(titles) - 2))
