"""The published ways to think in parallel, side by side: one model, one task, equal budgets.

    python -m benchmarks.methods [--seeds 1 2 3] [--out runs] [--only npr ...]

Runs the recipes of recipes/methods (about 3 CPU minutes a seed and method; a killed run resumes) and prints
a row for each: accuracy and tokens on held-out hard problems, after all steps; tokens that are computed a
second time (in mode `replay` the joined text is read anew) on problems that the release is posed once more;
of the RL steps the largest mismatch between rollout and training, and steps a second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from megatron_parallel_r1 import ParallelThinker
from megatron_parallel_r1.data.embedded.generate import evaluation_problems
from megatron_parallel_r1.thought.layout import lay_out
from megatron_parallel_r1.utils.jsonl import read_jsonl
from megatron_parallel_r1.utils.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("parallel_r1", "multiverse", "npr", "threadweaver")
PROBLEMS = 256
COLUMNS = (
    *("method", "accuracy, %", "with blocks, %", "paths a block", "critical tokens", "tokens"),
    *("computed twice", "mismatch", "steps/s"),
)


@dataclass(frozen=True, slots=True)
class MethodResult:
    """The figures of one seed."""

    accuracy: float
    parallel_ratio: float
    paths: float
    critical: float
    tokens: float
    twice: float
    mismatch: float
    rate: float

    @classmethod
    def of(cls, run: Path) -> MethodResult:
        evaluated = read_jsonl(run / "eval.jsonl")[-1]
        steps = [row for stage in ("rl_easy", "rl_hard") for row in read_jsonl(run / stage / "metrics.jsonl")]
        seconds = sum(row["time_rollout_s"] + row["time_train_s"] for row in steps)
        return cls(
            accuracy=100 * evaluated["accuracy"],
            parallel_ratio=100 * evaluated["parallel_ratio"],
            paths=evaluated["paths_per_block"] or 0.0,
            critical=evaluated["critical_length"],
            tokens=evaluated["length"],
            twice=_computed_twice(run / "release"),
            mismatch=max(row["mismatch_max"] for row in steps),
            rate=len(steps) / seconds,
        )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args(words)
    rows = []
    for method in args.only:
        recipe = ROOT / "recipes/methods" / f"{method}.yaml"
        seeds = json.dumps(args.seeds)
        command = [sys.executable, "-m", "megatron_parallel_r1.cli", "curriculum", str(recipe)]
        subprocess.run([*command, f"out={args.out}", f"seeds={seeds}"], check=True)
        runs = [args.out / f"method_{method}" / f"seed{seed}" for seed in args.seeds]
        rows.append((method, *_row([MethodResult.of(run) for run in runs])))
    print(markdown_table(COLUMNS, rows, "l" + "r" * (len(COLUMNS) - 1)))


def _row(results: Sequence[MethodResult]) -> list[str]:
    def spread(name: str, form: str) -> str:
        values = [getattr(result, name) for result in results]
        return f"{fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    forms = {"accuracy": ".1f", "parallel_ratio": ".0f", "paths": ".1f", "critical": ".1f", "tokens": ".1f"}
    texts = [spread(name, form) for name, form in forms.items()]
    most = max(result.mismatch for result in results)
    return [*texts, spread("twice", ".1f"), f"{most:.1e}", spread("rate", ".2f")]


def _computed_twice(release: Path) -> float:
    """Tokens of a training row beyond those of prompt and response, mean of a response.

    An engine without path isolation computes as many anew: all paths but the first, once they are joined.
    """
    thinker = ParallelThinker.load(release)
    problems = [problem.prompt for problem in evaluation_problems("hard", PROBLEMS)]
    beyond = []
    for response in thinker.generate(problems):
        trace = response.trace
        row = lay_out(trace.prompt, trace.tokens, trace.sampled, trace.tree, thinker.settings.mode)
        beyond.append(len(row) - len(trace.prompt) - len(trace.tokens))
    return fmean(beyond)


if __name__ == "__main__":
    main()
