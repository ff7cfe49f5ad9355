"""A real pretrained model through every part: `make real`, or in a few minutes `make real-short`.

Fetches SmolLM2-135M-Instruct, converts it to Megatron and back under two layouts, evaluates it untrained, and
runs `curriculum.yaml`: cold start, GRPO, evaluations, release, report. Killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.exit import block_stop_signals, run_and_exit
from megatron_parallel_r1.utils.files import write_atomically

HERE = Path(__file__).parent
OUT = Path("runs/real")
MODEL, DATA = OUT / "SmolLM2-135M-Instruct", OUT / "data"
LAYOUTS = ("tensor 3", "pipeline 2")
# A few steps of everything, which learn little.
SHORT = (
    "name=smollm2_short",
    "seeds=null",
    "seed=1",
    "stages.cold_start.steps=2",
    "stages.cold_start.examples_per_step=4",
    "stages.rl_parallel.steps=1",
    "stages.rl_parallel.prompts_per_step=2",
    "stages.rl_parallel.samples_per_prompt=2",
    # Nothing is right yet; lengths do differ.
    "stages.rl_parallel.reward={name: length, settings: {limit: 80}}",
    "stages.rl_sequential.steps=1",
    "stages.rl_sequential.prompts_per_step=2",
    "stages.rl_sequential.samples_per_prompt=2",
    "stages.rl_sequential.reward={name: length, settings: {limit: 80}}",
    "thinking.max_path_tokens=16",
    "thinking.max_response_tokens=80",
    "thinking.max_critical_tokens=40",
    "thinking.reserve_tokens=8",
    "evaluation.problems=4",
)


def main() -> int:
    """Runs all phases, or those that are left."""
    parser = argparse.ArgumentParser(description="Train a real pretrained model to think in parallel.")
    parser.add_argument("--short", action="store_true", help="a few steps of everything")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe, such as seeds=[1]")
    args = parser.parse_args()
    block_stop_signals()
    began = time.monotonic()

    def phase(name: str, work: Callable[[], None]) -> None:
        print(f"\n== {name} ({time.monotonic() - began:.0f} s so far)", flush=True)
        work()

    dtype = _number_format()
    phase("model and data", _prepare)
    for layout in LAYOUTS:
        phase(f"to Megatron and back, {layout}", lambda layout=layout: _round_trip(layout))
    overrides = [f"model.dtype={dtype}", *(SHORT if args.short else ()), *args.overrides]
    phase("evaluation before the training", lambda: _evaluate_base(overrides))
    phase("training", lambda: _train(overrides))
    print(f"\nall done in {time.monotonic() - began:.0f} s", flush=True)
    return 0


def _number_format() -> str:
    """The format that this CPU multiplies faster: bfloat16 if its rate is 1.5 times that of float32."""
    import torch

    file = OUT / "number_format.json"
    if not file.is_file():  # a resumed run keeps its own
        rates = {}
        for dtype in (torch.float32, torch.bfloat16):
            inputs, weight = torch.ones(128, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
            seconds = []
            for _ in range(4):
                start = time.perf_counter()
                torch.nn.functional.linear(inputs, weight)
                seconds.append(time.perf_counter() - start)
            rates[str(dtype).removeprefix("torch.")] = 2 * 128 * weight.numel() / min(seconds) / 1e9
        chosen = "bfloat16" if rates["bfloat16"] > 1.5 * rates["float32"] else "float32"
        OUT.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"chosen": chosen, "gflops": rates}))
    found = json.loads(file.read_text())
    rates = ", ".join(f"{rate:.0f} GFLOP/s in {name}" for name, rate in found["gflops"].items())
    print(f"number format: {found['chosen']} ({rates}; {torch.get_num_threads()} threads)")
    return str(found["chosen"])


def _prepare() -> None:
    from recipes.smollm2.model import model_folder
    from recipes.smollm2.word_problems import write_files

    OUT.mkdir(parents=True, exist_ok=True)
    folder = model_folder()
    if not MODEL.is_symlink() or MODEL.resolve() != folder.resolve():
        MODEL.unlink(missing_ok=True)
        MODEL.symlink_to(folder)
    print(f"model  {MODEL} -> {folder}")
    if not DATA.is_dir():
        begun = DATA.with_name(".data")
        write_files(begun)
        begun.rename(DATA)
    print(f"data   {DATA}: {', '.join(sorted(file.name for file in DATA.iterdir()))}")


def _round_trip(layout: str) -> None:
    """Converts the model and converts the result back; compares the weights, and once the logits."""
    from megatron_parallel_r1.conversion import command

    name, size = layout.split()
    done, megatron, back = (OUT / f"{what}_{name}_{size}" for what in ("verified", "megatron", "back"))
    if done.is_file():
        print("already done")
        return
    if not megatron.is_dir():
        command.hf_to_megatron_command([str(MODEL), str(megatron), f"--{name}", size])
    if not back.is_dir():
        command.megatron_to_hf_command([str(megatron), str(back)])
    checks = [[str(back), "--no-logits"], *([[str(megatron)]] if layout == LAYOUTS[0] else [])]
    for words in checks:
        if command.verify_command([str(MODEL), *words]):
            raise UserError(f"{words[0]} differs from {MODEL}; the conversion is at fault, please report it")
    shutil.rmtree(megatron)
    shutil.rmtree(back)
    done.touch()


def _evaluate_base(overrides: list[str]) -> None:
    """Evaluates the model before any training, in sequential mode: it knows no tags."""
    from megatron_parallel_r1.config.reader import read_recipe
    from megatron_parallel_r1.curriculum.evaluation import evaluate_checkpoint
    from megatron_parallel_r1.curriculum.run import open_console
    from megatron_parallel_r1.report.evaluation_table import evaluation_table
    from megatron_parallel_r1.utils.files import write_atomically

    overrides = [*overrides, "thinking.mode=sequential"]
    recipe = read_recipe(HERE / "curriculum.yaml", overrides, trains=False)
    file = OUT / f"{recipe.name}_before.json"
    if not file.is_file():
        write_atomically(file, json.dumps(evaluate_checkpoint(recipe, MODEL)))
    open_console().print(evaluation_table([json.loads(file.read_text())]).terminal())


def _train(overrides: list[str]) -> None:
    from megatron_parallel_r1.config.reader import read_recipe
    from megatron_parallel_r1.curriculum.run import open_console, run

    console = open_console()
    for outcome in run(read_recipe(HERE / "curriculum.yaml", overrides), console=console):
        console.print(f"release  {outcome.release}", soft_wrap=True, highlight=False)
        console.print(f"report   {outcome.report}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of transformers; ours are other ones
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))  # products this large use all cores
    run_and_exit(main, "the same command goes on")
