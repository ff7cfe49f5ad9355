"""What a site has edited: `slurm/site.env`, and the #SBATCH lines of the scripts."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.settings import EngineName

SCRIPTS = {"sft": "sft_stage.sh", "rl": "rl_stage.sh", "curriculum": "curriculum.sh", "eval": "eval.sh"}
# Settings that are whole numbers, and the least that each may be.
NUMBERS = {
    "ROLLOUT_NODES": 0,
    "ROLLOUT_SERVERS": 1,
    "ROLLOUT_TENSOR": 1,
    "ROLLOUT_WAIT_S": 1,
    "GRACE_S": 1,
    "MAX_FAILURES": 1,
}
# Of the options that are read here, and of those that a site is told to edit.
SHORT = {
    "A": "account",
    "J": "job-name",
    "N": "nodes",
    "c": "cpus-per-task",
    "o": "output",
    "p": "partition",
    "t": "time",
}
NAMES = ("PYTHON", "LOG_DIR", "CONTAINER", "ROLLOUT_ENGINE", "ROLLOUT_PYTHON", *NUMBERS)


@dataclass(frozen=True, slots=True)
class Header:
    """The #SBATCH lines of a script that a submission from Python needs itself; `more` are all others.

    Attributes:
        gpu_type: as it stands before the number of GPUs, its colon included; empty: any.
    """

    nodes: int
    ranks_per_node: int
    gpu_type: str
    gpus_per_node: int
    cpus_per_rank: int
    minutes: int
    signal_s: int
    more: dict[str, str | bool]


def read_site(folder: Path) -> dict[str, str]:
    """The values of `site.env` in the folder of the scripts, or of the environment where it has them.

    Raises:
        UserError: the file is missing, or bash cannot read it.
    """
    file = folder / "site.env"
    if not file.is_file():
        raise UserError(f"{file} is missing; run launch.py from the repository")
    shown = " ".join(f'"${{{name}:-}}"' for name in NAMES)
    said = subprocess.run(
        ["bash", "-euc", f'source "$0"; printf "%s\\0" {shown}', str(file)], capture_output=True, text=True
    )
    if said.returncode:
        raise UserError(f"{file}: {' '.join(said.stderr.split())}")
    return dict(zip(NAMES, said.stdout.split("\0"), strict=False))


def read_header(script: Path) -> Header:
    """
    Raises:
        UserError: a number or a time in it is none, or a line cannot be read.
    """
    told = read_options(script)
    try:
        warned = re.fullmatch(r"(?:[A-Z]*:)?\w+@(\d+)", str(told.pop("signal", "B:USR1@90")))
        if warned is None:
            raise ValueError("--signal")
        gpus = re.fullmatch(r"((?:[^:,]+:)*)(\d+)", str(told.pop("gpus-per-node", 0)))
        if gpus is None:
            raise ValueError("--gpus-per-node")
        header = Header(
            nodes=int(str(told.pop("nodes", 1))),
            ranks_per_node=int(str(told.pop("ntasks-per-node", 1))),
            gpu_type=gpus[1],
            gpus_per_node=int(gpus[2]),
            cpus_per_rank=int(str(told.pop("cpus-per-task", 1))),
            minutes=minutes_of(str(told.pop("time", "60"))),
            signal_s=int(warned[1]),
            more=told,
        )
    except ValueError as error:
        raise UserError(f"{script}: an #SBATCH line has no number where one belongs ({error})") from None
    for own in ("job-name", "output", "open-mode"):  # launch.py has its own
        header.more.pop(own, None)
    return header


def read_options(script: Path) -> dict[str, str | bool]:
    """The #SBATCH lines of a script as sbatch reads them: above its first command. By long names; True: an
    option without a value.

    Raises:
        UserError: a line cannot be read.
    """
    told: dict[str, str | bool] = {}
    head = re.match(r"(?:[ \t]*(?:#.*)?\n)*", script.read_text())[0]
    for line in re.findall(r"^#SBATCH\b(.*)$", head, re.M):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"{script}: #SBATCH{line}: {error}") from None
        waiting = None
        for word in words:
            long = re.fullmatch(r"--([a-z][a-z-]*)(?:=(.+))?", word)
            short = re.fullmatch(rf"-([{''.join(SHORT)}])(.+)?", word)
            if long or short:
                key, value = (long[1], long[2]) if long else (SHORT[short[1]], short[2])
                told[key], waiting = value or True, None if value else key
            elif waiting and not re.match("-[a-zA-Z-]", word):
                told[waiting], waiting = word, None
            else:
                raise UserError(f"{script}: #SBATCH{line}: {word} is no option; write --name=value")
    return told


def minutes_of(time: str) -> int:
    """Of a time as SLURM writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2}", time):
        raise ValueError(f"{time} is no time")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, *_ = [*parts, 0]
        return int(days) * 1440 + hours * 60 + minutes
    return parts[0] * 60 + parts[1] if len(parts) == 3 else parts[0]


def has_slurm() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def check_site(site: dict[str, str], header: Header) -> None:
    """
    Raises:
        UserError: a setting names what is not there, or what does not fit.
    """
    for name, least in NUMBERS.items():
        if not re.fullmatch("0|[1-9][0-9]*", site[name]) or int(site[name]) < least:
            raise UserError(f"{name}={site[name]} is no whole number from {least} on; mend slurm/site.env")
    rollout, container = site["ROLLOUT_NODES"], site["CONTAINER"]
    if int(rollout) >= header.nodes:
        raise UserError(f"ROLLOUT_NODES={rollout} of {header.nodes} nodes leaves none to train")
    if int(rollout):
        check_servers(site, header)
    if container.endswith((".sif", ".sqsh")) and not Path(container).is_file():
        raise UserError(f"CONTAINER={container}: no such file")
    if not container and shutil.which(site["PYTHON"]) is None:
        raise UserError(f"PYTHON={site['PYTHON']}: no such program; `make test` makes .venv, or set PYTHON")
    if int(site["GRACE_S"]) >= header.signal_s:
        raise UserError(
            f"GRACE_S={site['GRACE_S']} must be less than the {header.signal_s} s of #SBATCH --signal"
        )
    if os.sep in site["LOG_DIR"] and not Path(site["LOG_DIR"]).parent.is_dir():
        raise UserError(f"LOG_DIR={site['LOG_DIR']}: its parent folder is missing")


def check_servers(site: dict[str, str], header: Header) -> None:
    """
    Raises:
        UserError: the rollout servers could not start.
    """
    engine, python, container = (site[name] for name in ("ROLLOUT_ENGINE", "ROLLOUT_PYTHON", "CONTAINER"))
    known = get_args(EngineName)
    if engine not in known:
        raise UserError(f"ROLLOUT_ENGINE={engine} is none of {', '.join(known)}; mend slurm/site.env")
    # Of an absolute path, only the nodes know; of any in a container, only that.
    if python and not container and not Path(python).is_absolute() and not os.access(python, os.X_OK):
        raise UserError(f"ROLLOUT_PYTHON={python}: no such program; `make engines` makes those that run here")
    wanted = int(site["ROLLOUT_SERVERS"]) * int(site["ROLLOUT_TENSOR"])
    if header.gpus_per_node and wanted > header.gpus_per_node:
        raise UserError(
            f"ROLLOUT_SERVERS={site['ROLLOUT_SERVERS']} of ROLLOUT_TENSOR={site['ROLLOUT_TENSOR']} GPUs need "
            f"{wanted}, a node has {header.gpus_per_node}; lower one of the two"
        )
