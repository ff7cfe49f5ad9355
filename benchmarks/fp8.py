"""What FP8 training does to RL whose rollouts are bfloat16's: mismatch and accuracy, over seeds.

    TRANSFORMER_ENGINE_SOURCE=$(.ci/transformer_engine) python -m benchmarks.fp8 [--seeds 1 2 3] [--steps 40]

The tiny curriculum: a base by SFT, of which copies go on with GRPO in bfloat16, and in FP8 with and without
truncated importance sampling (docs/rl.md). Without a GPU FP8 is computed by the fake of Transformer Engine's
library (tests/fake_engine/): the arithmetic of FP8, and not its speed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from megatron_parallel_r1.utils.imports import prepare_imports

COMPARE = Path(__file__).parents[1] / "recipes/tiny/compare.yaml"
FP8 = {"model.layers": "transformer_engine", "model.fp8": "current"}
TRUNCATED = {"stages.rl.objective.correction": "truncate"}
VARIANTS: dict[str, dict[str, str]] = {
    "bfloat16": {},
    "FP8": FP8,
    "FP8, truncated importance sampling": FP8 | TRUNCATED,
}
# Means over the steps, but the largest of `mismatch_max`.
METRICS = ("mismatch_mean", "mismatch_max", "mismatch_k3", "mismatch_effective", "grad_norm")


def train(folder: Path, content: dict[str, object], settings: dict[str, object]) -> Path:
    """Runs a recipe and returns its folder."""
    from rich.console import Console

    from megatron_parallel_r1.config.reader import read_recipe
    from megatron_parallel_r1.curriculum.run import run

    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    words = [f"{name}={value}" for name, value in settings.items()]
    stages = {stage["name"] for stage in content["stages"]}
    (done,) = run(read_recipe(file, [*words, f"out={folder}"]), only=stages, console=Console(quiet=True))
    return done.folder


def measure(folder: Path, seed: int, steps: int, problems: int) -> dict[str, dict[str, float]]:
    """Each variant's metrics and final accuracy, from one base."""
    from megatron_parallel_r1.report.run_folder import read_run

    whole = yaml.safe_load(COMPARE.read_text())
    del whole["seeds"]
    *sft, rl, _sequential = whole["stages"]
    common: dict[str, object] = {"seed": seed, "evaluation.problems": problems}
    base = train(folder, whole | {"stages": sft, "name": "base"}, common)
    found = {"base": {"accuracy": read_run(base).evals[-1]["accuracy"]}}
    content = whole | {
        "model": {"path": str(base / "base/model"), "dtype": "bfloat16"},
        "tokenizer": whole["tokenizer"],
        "stages": [{key: value for key, value in rl.items() if key != "start_from"} | {"name": "rl"}],
    }
    common["stages.rl.steps"] = steps
    for number, (name, settings) in enumerate(VARIANTS.items()):
        read = read_run(train(folder, content | {"name": f"rl{number}"}, common | settings))
        rows = read.stages[-1].metrics
        found[name] = {
            metric: (max if metric == "mismatch_max" else statistics.fmean)(row[metric] for row in rows)
            for metric in METRICS
        }
        found[name]["accuracy"] = read.evals[-1]["accuracy"]
    return found


def table(by_seed: Sequence[dict[str, dict[str, float]]]) -> str:
    """Means over the seeds; accuracy with each seed's."""
    lines = [
        "| training | " + " | ".join(f"`{metric}`" for metric in METRICS) + " | accuracy | by seed |",
        "|---|" + "---:|" * (len(METRICS) + 2),
    ]
    for name in by_seed[0]:
        rows = [found[name] for found in by_seed]
        cells = [
            f"{statistics.fmean(row[metric] for row in rows):.3g}" if metric in rows[0] else ""
            for metric in METRICS
        ]
        accuracies = [row["accuracy"] for row in rows]
        spread = f" ± {statistics.stdev(accuracies):.1%}" if accuracies[1:] else ""
        cells += [f"{statistics.fmean(accuracies):.1%}{spread}"]
        cells += [", ".join(f"{accuracy:.1%}" for accuracy in accuracies)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=40, help="of RL")
    parser.add_argument("--problems", type=int, default=512, help="of the evaluation")
    arguments = parser.parse_args()
    prepare_imports()
    warnings.simplefilter("ignore")
    if not torch.cuda.is_available():
        from tests.fake_engine.library import install

        if "TRANSFORMER_ENGINE_SOURCE" not in os.environ:
            parser.exit(2, "set TRANSFORMER_ENGINE_SOURCE to Transformer Engine's unpacked Python\n")
        install(Path(os.environ["TRANSFORMER_ENGINE_SOURCE"]))
    found = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(Path(folder), seed, arguments.steps, arguments.problems))
        print(table(found), flush=True)


if __name__ == "__main__":
    main()
