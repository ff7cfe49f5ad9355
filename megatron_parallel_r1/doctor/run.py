"""All checks of the doctor in order, on all ranks of a launch, as one table and an exit code."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.collectives import all_gather_objects
from megatron_parallel_r1.doctor import kernels, node, ranks
from megatron_parallel_r1.doctor.findings import Finding, examine, findings_table, merge, verdict
from megatron_parallel_r1.doctor.rehearsal import rehearse
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import LaunchSettings
from megatron_parallel_r1.rollout.launcher.run import find_python
from megatron_parallel_r1.utils.files import check_writable
from megatron_parallel_r1.utils.rank import is_rank_zero

EngineChoice = Literal["auto", "native", "sglang", "vllm"]
# A collective that takes longer ends with the name of the rank that is missing.
COLLECTIVE_S = 300.0


def examine_all(out: Path, engine: EngineChoice, console: Console) -> bool:
    """Runs all checks and prints the table; returns whether runs will work here, as rank 0 knows it.

    Other ranks return true: a launcher ends all ranks with the first that fails, and would cut off the table.

    Args:
        out: where the runs will be; the checks write a few files there and remove them.
        engine: what samples in the trial run; auto: SGLang if its environment is there, else native.

    Raises:
        UserError: `out` cannot be written.
    """
    check_writable(out)
    chosen = _engine(engine)

    def show(step: str) -> None:
        if is_rank_zero():
            console.print(f"checking {step} ...", style="dim", highlight=False)

    findings: list[Finding] = []
    with process.running(1, timeout_s=COLLECTIVE_S), ThreadPoolExecutor(1) as beside:
        out.mkdir(parents=True, exist_ok=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        show("the node")
        findings += examine("software", node.software)
        findings += examine("GPU", node.gpus)
        findings += examine("node", node.memory)
        servers: Future[list[Finding]] | None = None
        if is_rank_zero():
            findings += examine("disk", partial(node.disk, out))
            if chosen != "native":  # their interpreter imports torch, which takes a while
                servers = beside.submit(examine, "servers", partial(node.engine, chosen))
        show("clocks, the shared folder and the network")
        findings += examine("clocks", ranks.clocks)
        findings += examine("shared folder", partial(ranks.shared_folder, out))
        findings += examine("all-reduce", ranks.all_reduce)
        show("the attention kernels")
        findings += examine("attention", partial(kernels.attention, device))
        if servers is not None:
            findings += servers.result()
        by_rank = all_gather_objects(findings)
    show(f"a whole run with {chosen}")
    trial = examine(f"run with {chosen}", partial(rehearse, out.resolve(), chosen))
    if not is_rank_zero():
        return True
    rows = merge(by_rank) + merge([trial])
    console.print(findings_table(rows).terminal())
    console.print(verdict(rows), style="bold", highlight=False)
    return not any(row.finding.level == "fault" for row in rows)


def _engine(choice: EngineChoice) -> Literal["native", "sglang", "vllm"]:
    if choice != "auto":
        return choice
    try:
        find_python(LaunchSettings(checkpoint=Path(), engine="sglang"))
    except UserError:
        return "native"
    return "sglang"
