"""A site's settings: `slurm/site.env` and the #SBATCH lines of the scripts."""

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
from megatron_parallel_r1.rollout.launcher.command import EngineName

SCRIPTS = {
    "sft": "sft_stage.sh",
    "rl": "rl_stage.sh",
    "distill": "distill_stage.sh",
    "curriculum": "curriculum.sh",
    "eval": "eval.sh",
    "doctor": "doctor.sh",
}
# Integer settings and their minimum.
NUMBERS = {
    "ROLLOUT_NODES": 0,
    "ROLLOUT_SERVERS": 1,
    "ROLLOUT_TENSOR": 1,
    "ROLLOUT_WAIT_S": 1,
    "GRACE_S": 1,
    "MAX_FAILURES": 1,
    "MAX_STOPS": 1,
}
# Short forms of the options that are parsed here or that a site is expected to edit.
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
class SbatchHeader:
    """The #SBATCH options of a script; `more` holds those that have no field of their own.

    Attributes:
        gpu_type: prefix of the GPU count, including its colon, such as `h100:`; empty for any type.
        minutes: time limit.
        signal_s: seconds from the stop signal to the time limit.
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
    """Reads `site.env` from the folder of the scripts; environment variables take precedence.

    Raises:
        UserError: the file is missing, or bash cannot read it.
    """
    file = folder / "site.env"
    if not file.is_file():
        raise UserError(f"{file} is missing; run launch.py from the repository")
    variables = " ".join(f'"${{{name}:-}}"' for name in NAMES)
    bash = subprocess.run(
        ["bash", "-euc", f'source "$0"; printf "%s\\0" {variables}', str(file)],
        capture_output=True,
        text=True,
    )
    if bash.returncode:
        raise UserError(f"{file}: {' '.join(bash.stderr.split())}")
    return dict(zip(NAMES, bash.stdout.split("\0"), strict=False))


def read_header(script: Path) -> SbatchHeader:
    """
    Raises:
        UserError: a line is malformed, or has no number or time where one is required.
    """
    options = read_sbatch_options(script)
    try:
        warning = re.fullmatch(r"(?:[A-Z]*:)?\w+@(\d+)", str(options.pop("signal", "B:USR1@90")))
        if warning is None:
            raise ValueError("--signal")
        gpus = re.fullmatch(r"((?:[^:,]+:)*)(\d+)", str(options.pop("gpus-per-node", 0)))
        if gpus is None:
            raise ValueError("--gpus-per-node")
        header = SbatchHeader(
            nodes=int(str(options.pop("nodes", 1))),
            ranks_per_node=int(str(options.pop("ntasks-per-node", 1))),
            gpu_type=gpus[1],
            gpus_per_node=int(gpus[2]),
            cpus_per_rank=int(str(options.pop("cpus-per-task", 1))),
            minutes=parse_minutes(str(options.pop("time", "60"))),
            signal_s=int(warning[1]),
            more=options,
        )
    except ValueError as error:
        raise UserError(f"{script}: an #SBATCH line lacks a number ({error})") from None
    for name in ("job-name", "output", "open-mode"):  # set by submitit
        header.more.pop(name, None)
    return header


def read_sbatch_options(script: Path) -> dict[str, str | bool]:
    """Parses a script's #SBATCH lines above its first command, as sbatch does.

    Returns:
        Values by the options' long names; True for an option without a value.

    Raises:
        UserError: a line is malformed.
    """
    options: dict[str, str | bool] = {}
    head = re.match(r"(?:[ \t]*(?:#.*)?\n)*", script.read_text())
    assert head, "the pattern matches the empty string"
    for line in re.findall(r"^#SBATCH\b(.*)$", head[0], re.M):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"{script}: #SBATCH{line}: {error}") from None
        pending = None  # an option that may still get its value as the next word
        for word in words:
            long = re.fullmatch(r"--([a-z][a-z-]*)(?:=(.+))?", word)
            short = re.fullmatch(rf"-([{''.join(SHORT)}])(.+)?", word)
            if option := long or short:
                key, value = (option[1] if long else SHORT[option[1]]), option[2]
                options[key], pending = value or True, None if value else key
            elif pending and not re.match("-[a-zA-Z-]", word):
                options[pending], pending = word, None
            else:
                raise UserError(f"{script}: #SBATCH{line}: {word} is not an option; write --name=value")
    return options


def parse_minutes(time: str) -> int:
    """Converts a SLURM time limit, M, M:S, H:M:S, D-H, D-H:M or D-H:M:S, to minutes; seconds are dropped.

    Raises:
        ValueError: none of these forms.
    """
    if not re.fullmatch(r"\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2}", time):
        raise ValueError(f"{time} is not a time")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, *_ = [*parts, 0]
        return int(days) * 1440 + hours * 60 + minutes
    return parts[0] * 60 + parts[1] if len(parts) == 3 else parts[0]


def has_slurm() -> bool:
    """Returns whether this machine can submit jobs to SLURM."""
    return shutil.which("sbatch") is not None


def check_site(site: dict[str, str], header: SbatchHeader) -> None:
    """
    Raises:
        UserError: a setting is malformed, names a missing file, or contradicts the header.
    """
    for name, minimum in NUMBERS.items():
        if not re.fullmatch("0|[1-9][0-9]*", site[name]) or int(site[name]) < minimum:
            raise UserError(f"{name}={site[name]} is not an integer >= {minimum}; edit slurm/site.env")
    rollout, container = site["ROLLOUT_NODES"], site["CONTAINER"]
    if int(rollout) >= header.nodes:
        raise UserError(f"ROLLOUT_NODES={rollout} of {header.nodes} nodes leaves none for training")
    if int(rollout):
        check_servers(site, header)
    if container.endswith((".sif", ".sqsh")) and not Path(container).is_file():
        raise UserError(f"CONTAINER={container}: no such file")
    if not container and shutil.which(site["PYTHON"]) is None:
        raise UserError(f"PYTHON={site['PYTHON']}: no such program; `make test` creates .venv, or set PYTHON")
    if int(site["GRACE_S"]) >= header.signal_s and "no-requeue" not in header.more:
        raise UserError(
            f"GRACE_S={site['GRACE_S']} must be less than the {header.signal_s} s of #SBATCH --signal"
        )
    if os.sep in site["LOG_DIR"] and not Path(site["LOG_DIR"]).parent.is_dir():
        raise UserError(f"LOG_DIR={site['LOG_DIR']}: the parent folder is missing")


def check_servers(site: dict[str, str], header: SbatchHeader) -> None:
    """
    Raises:
        UserError: the rollout servers cannot start with these settings.
    """
    engine, python, container = (site[name] for name in ("ROLLOUT_ENGINE", "ROLLOUT_PYTHON", "CONTAINER"))
    known = get_args(EngineName)
    if engine not in known:
        raise UserError(f"ROLLOUT_ENGINE={engine} is not one of {', '.join(known)}; edit slurm/site.env")
    # Only a node can check an absolute path, and only the container a path inside it.
    if python and not container and not Path(python).is_absolute() and not os.access(python, os.X_OK):
        raise UserError(f"ROLLOUT_PYTHON={python}: no such program; `make engines` creates it")
    servers, tensor, gpus = int(site["ROLLOUT_SERVERS"]), int(site["ROLLOUT_TENSOR"]), header.gpus_per_node
    if not gpus or servers * tensor <= gpus:
        return
    nodes, odd = divmod(tensor, gpus)
    if engine != "sglang" or odd or servers > 1:
        raise UserError(
            f"ROLLOUT_SERVERS={servers} of ROLLOUT_TENSOR={tensor} GPUs need {servers * tensor}, a node has "
            f"{gpus}; lower one of the two, or have one SGLang server take whole nodes: ROLLOUT_SERVERS=1, "
            f"ROLLOUT_TENSOR a multiple of {gpus}"
        )
    if int(site["ROLLOUT_NODES"]) % nodes:
        raise UserError(
            f"ROLLOUT_NODES={site['ROLLOUT_NODES']} is not a multiple of the {nodes} nodes that a server of "
            f"ROLLOUT_TENSOR={tensor} takes"
        )
