"""A tiny curriculum from start to release on this machine, with the real trainer and real rollout servers."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path

import torch
from rich.console import Console

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.curriculum.run import run
from megatron_parallel_r1.doctor.findings import Finding
from megatron_parallel_r1.utils.rank import is_rank_zero

RECIPE = Path("tiny/doctor")


def rehearse(folder: Path, engine: str) -> list[Finding]:
    """Runs the packaged recipe `tiny/doctor`; its run folder is removed if it ends well.

    Every rank calls it, with no process group open. On GPUs the model is in bfloat16, and a server shares the
    GPU of rank 0. SGLang is handed its weights as on one node of a flagship recipe: colocated, as tensors.

    Raises:
        UserError: what a run would end with.
    """
    overrides = [f"out={folder}", f"name=doctor_{engine}"]
    if engine != "native":
        overrides += [f"rollout.engine={engine}", "rollout.servers=1"]
    if torch.cuda.is_available():
        overrides.append("model.dtype=bfloat16")
    if engine == "sglang":
        overrides += ["rollout.colocated=true", "rollout.sync={transport: tensor}"]
    elif engine == "vllm":
        overrides.append(f"rollout.sync={{transport: disk, folder: {folder / 'doctor_vllm_sync'}}}")
        overrides += ["rollout.colocated=true"] if torch.cuda.is_available() else []
    recipe = read_recipe(RECIPE, overrides)
    started = time.monotonic()
    done = run(recipe, fresh=True, console=Console(file=io.StringIO()))[0]
    seconds = time.monotonic() - started
    if not is_rank_zero():
        return []
    steps = [json.loads(line) for line in (done.folder / "rl/metrics.jsonl").read_text().splitlines()]
    found = f"SFT, {len(steps)} RL steps and a release in {seconds:.0f} s; log-probs of rollout and trainer "
    found += f"at most {max(step['mismatch_max'] for step in steps):.1e} nats apart"
    shutil.rmtree(done.folder)
    shutil.rmtree(folder / f"doctor_{engine}_sync", ignore_errors=True)
    return [Finding(f"run with {engine}", found)]
