"""The same evaluation over several seeds, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

Evaluations = Sequence[Mapping[str, Any]]


def across_seeds(by_seed: Mapping[int, Evaluations]) -> str:
    """A Markdown table: a row a stage, its accuracy from each seed, their mean and standard deviation.

    Args:
        by_seed: evaluation records of each seed's run; stages that not all of them have are left out.
    """
    seeds = list(by_seed)
    by_stage = [{record["stage"]: record for record in records} for records in by_seed.values()]
    shared = [stage for stage in by_stage[0] if all(stage in records for records in by_stage)]
    head = ["stage", "mode", *(f"seed {seed}" for seed in seeds), "mean ± sd", "critical path", "length"]
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for records in ([records[stage] for records in by_stage] for stage in shared):
        accuracies = [record["accuracy"] for record in records]
        spread = f" ± {stdev(accuracies):.1%}" if len(accuracies) > 1 else ""
        rows.append(
            [
                str(records[0]["stage"]),
                str(records[0]["mode"]),
                *(f"{accuracy:.1%}" for accuracy in accuracies),
                f"{fmean(accuracies):.1%}{spread}",
                f"{fmean(record['critical_length'] for record in records):.1f}",
                f"{fmean(record['length'] for record in records):.1f}",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
