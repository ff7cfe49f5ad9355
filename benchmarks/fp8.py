"""What FP8 training does to RL whose rollouts are bfloat16's: mismatch and accuracy, over seeds.

    TRANSFORMER_ENGINE_SOURCE=$(.ci/transformer_engine) python -m benchmarks.fp8 [--seeds 1 2 3] [--steps 12]

The tiny curriculum: one base by SFT, of which copies go on with GRPO in bfloat16, and in FP8 with and without
truncated importance sampling (docs/rl.md), for each seed. Without a GPU the fake of Transformer Engine's
library computes FP8 (tests/fake_engine/): its arithmetic, and not its speed.
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
TRUNCATED = {"stages.rl_parallel.objective.correction": "truncate"}
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
    names = {stage["name"] for stage in content["stages"]}
    (done,) = run(read_recipe(file, [*words, f"out={folder}"]), only=names, console=Console(quiet=True))
    return done.folder


def stages(recipe: dict[str, object], names: Sequence[str]) -> dict[str, object]:
    chosen = [stage for stage in recipe["stages"] if stage["name"] in names]
    return recipe | {
        "stages": [{key: stage[key] for key in stage if key != "start_from"} for stage in chosen]
    }


def measure(
    folder: Path, base: Path, recipe: dict[str, object], settings: dict[str, object]
) -> dict[str, dict[str, float]]:
    """Each variant's metrics and final accuracy, from one base."""
    from megatron_parallel_r1.report.run_folder import read_run

    found = {}
    content = stages(recipe, ["rl_parallel"]) | {"model": {"path": str(base), "dtype": "bfloat16"}}
    for number, (name, own) in enumerate(VARIANTS.items()):
        read = read_run(train(folder, content | {"name": f"rl{number}"}, settings | own))
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
    parser.add_argument("--steps", type=int, default=12, help="of RL, each of six prompts")
    parser.add_argument(
        "--sft-steps", type=int, nargs=2, default=[250, 200], help="of both stages of the base"
    )
    parser.add_argument("--problems", type=int, default=256, help="of the evaluation")
    arguments = parser.parse_args()
    prepare_imports()
    warnings.simplefilter("ignore")
    if not torch.cuda.is_available():
        from tests.fake_engine.extension import install

        if "TRANSFORMER_ENGINE_SOURCE" not in os.environ:
            parser.exit(2, "set TRANSFORMER_ENGINE_SOURCE to Transformer Engine's unpacked Python\n")
        install(Path(os.environ["TRANSFORMER_ENGINE_SOURCE"]))
    from megatron_parallel_r1.report.run_folder import read_run

    recipe = yaml.safe_load(COMPARE.read_text())
    del recipe["seeds"]
    common: dict[str, object] = {"evaluation.problems": arguments.problems}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = stages(recipe, ["arithmetic", "base"]) | {"name": "base"}
        for stage, count in zip(content["stages"], arguments.sft_steps, strict=True):
            stage["steps"] = count
        base = train(folder, content, common | {"seed": arguments.seeds[0]})
        print(f"base: accuracy {read_run(base).evals[-1]['accuracy']:.1%}", flush=True)
        common |= {"stages.rl_parallel.steps": arguments.steps, "stages.rl_parallel.prompts_per_step": 6}
        found = []
        for seed in arguments.seeds:
            (own := folder / f"seed{seed}").mkdir()
            found.append(measure(own, base / "base/model", recipe, common | {"seed": seed}))
            print(table(found), flush=True)


if __name__ == "__main__":
    main()
