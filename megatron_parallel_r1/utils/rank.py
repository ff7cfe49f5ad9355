"""This process's place in its launch, from the environment that torchrun and SLURM scripts set."""

from __future__ import annotations

import os


def world_size() -> int:
    """Returns the number of ranks of the launch; known before they have connected."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1


def rank() -> int:
    """Returns this process's rank; 0 in a world of one."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_world_size() -> int:
    """Returns the number of ranks on this node; of the whole launch if the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


def local_rank() -> int:
    """Returns this process's rank on its node; its rank if the launcher does not say."""
    return int(os.environ.get("LOCAL_RANK", rank())) if world_size() > 1 else 0


def is_rank_zero() -> bool:
    """Returns whether this is rank 0, which writes the run's files and prints."""
    return rank() == 0
