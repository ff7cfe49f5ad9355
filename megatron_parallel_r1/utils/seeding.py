"""Which seed each of a run's draws has."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from megatron_parallel_r1.config.recipe import Recipe


def seed_of(recipe: Recipe, *words: str) -> int:
    """A seed for one purpose of a recipe, different for each."""
    keys = [zlib.crc32(word.encode()) for word in words]
    return int(np.random.SeedSequence([recipe.seed, *keys]).generate_state(1)[0])


def all_seeds(recipe: Recipe) -> dict[str, Any]:
    """Every seed of a run, for its folder.

    The n-th trace of a step has the n-th number that `rollout` and the step generate (rl/rollout_batch.py).
    """
    return {
        "recipe": recipe.seed,
        "evaluation": seed_of(recipe, "evaluation"),
        "stages": {
            stage.name: {purpose: seed_of(recipe, stage.name, purpose) for purpose in ("data", "rollout")}
            for stage in recipe.stages
        },
    }
