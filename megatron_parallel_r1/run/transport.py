"""The transport by which weights can reach the servers, by the NCCL versions of both sides.

One NCCL group needs the same version in all of its processes; another one ends its creation ("Mismatched NCCL
version detected", NCCL's `init.cc`). So the versions are compared before a group is opened.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_parallel_r1.config.rollout import Rollout
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import LaunchSettings
from megatron_parallel_r1.rollout.launcher.run import find_python
from megatron_parallel_r1.rollout.servers.client import ServerInfo
from megatron_parallel_r1.sync.settings import Sync

Version = tuple[int, ...]

# Run by the engine's interpreter, which may be that of another environment.
_ENGINE_VERSIONS = """
import importlib.metadata, json, sys, torch
nccl = torch.cuda.nccl.version() if torch.version.cuda else ()
engine = importlib.metadata.version(sys.argv[1])
print(json.dumps({"engine": engine, "torch": torch.__version__, "nccl": nccl}))
"""


@dataclass(frozen=True, slots=True)
class EngineVersions:
    """Versions in an engine's environment; `nccl` is None in one for CPUs."""

    engine: str
    torch: str
    nccl: Version | None


def engine_versions(python: Path, engine: str) -> EngineVersions:
    """Asks the interpreter of an engine, which takes the seconds of an import.

    Raises:
        UserError: it cannot import torch or has no such engine.
    """
    try:
        done = subprocess.run(
            [str(python), "-c", _ENGINE_VERSIONS, engine], capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{python}: {error}") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{python}: {last}")
    found = json.loads(done.stdout.splitlines()[-1])
    return EngineVersions(found["engine"], found["torch"], tuple(found["nccl"][:3]) or None)


def trainer_nccl() -> Version | None:
    """The version of this process; None without GPUs."""
    return tuple(torch.cuda.nccl.version()[:3]) if torch.cuda.is_available() else None


def server_nccl(rollout: Rollout, infos: Mapping[str, ServerInfo]) -> dict[str, Version | None]:
    """The version of each server, by URL; None: unknown.

    Args:
        infos: of servers that run; without them, those that the run will start count as one.
    """
    if not rollout.servers:
        return {url: info.nccl for url, info in infos.items()}
    try:
        python = find_python(LaunchSettings(checkpoint=Path(), engine="sglang"))
        version = engine_versions(python, "sglang").nccl
    except UserError:
        version = None
    return {f"the run's {rollout.engine} servers": version}


def usable_sync(rollout: Rollout, infos: Mapping[str, ServerInfo]) -> tuple[Sync, str]:
    """The settings to use, and a warning if they are not the recipe's.

    Raises:
        UserError: the weights cannot travel as the recipe says, and no folder is set for them.
    """
    sync, ours = rollout.sync, trainer_nccl()
    if sync.transport != "distributed" or sync.backend == "gloo" or ours is None:
        return sync, ""
    others = {
        where: version
        for where, version in server_nccl(rollout, infos).items()
        if version is not None and version != ours
    }
    if not others:
        return sync, ""
    where, theirs = next(iter(others.items()))
    difference = (
        f"rollout.sync.transport distributed: NCCL is {_text(ours)} here and {_text(theirs)} in {where}, "
        "which cannot share a group"
    )
    if sync.folder is None:
        raise UserError(
            f"{difference}; set transport disk with a folder that all see, or give both one NCCL as "
            "slurm/container/Dockerfile does"
        )
    return sync.replace(transport="disk"), f"{difference}; weights go through {sync.folder} (disk)"


def _text(version: Version) -> str:
    return ".".join(map(str, version))
