"""What a job is to run, read from the words of its command line before anything is started."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_parallel_r1.config.reader import read_recipe, refuse_single_stage, stage_to_run
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.records import USUAL, records_under

KINDS = ("sft", "rl", "curriculum")


@dataclass(frozen=True, slots=True)
class Order:
    """
    Attributes:
        kind: one of KINDS, the command of `parallel-r1`.
        words: those behind it.
        recipe: that they name, read.
        stage: what it trains; None: all stages.
        folders: where its steps are written down.
    """

    kind: str
    words: tuple[str, ...]
    recipe: Recipe
    stage: str | None
    folders: tuple[Path, ...]

    @classmethod
    def read(cls, kind: str, words: Sequence[str]) -> Order:
        """
        Raises:
            UserError: the command line itself would refuse it, or the job could not be requeued with it.
        """
        parser = _Parser("RECIPE [--stage NAME] [KEY=VALUE]...")
        parser.add_argument("recipe", type=Path)
        parser.add_argument("overrides", nargs="*")
        parser.add_argument("--stage")
        parser.add_argument("--fresh", action="store_true")
        parser.add_argument("--adapt", action="store_true")
        told = parser.parse_intermixed_args(list(words))
        if told.fresh:
            raise UserError(
                "--fresh: a requeued job would begin anew each time; delete the run's folder instead"
            )
        recipe = read_recipe(told.recipe, told.overrides)
        stage: str | None = None
        if kind == "curriculum":
            refuse_single_stage(told.recipe)
        else:
            stage = stage_to_run(recipe, told.recipe, kind, told.stage)
        run = recipe.out / recipe.name
        runs = [run] if recipe.seeds is None else [run / f"seed{seed}" for seed in recipe.seeds]
        return cls(kind, tuple(words), recipe, stage, tuple(one / stage if stage else one for one in runs))


def records_of(words: Sequence[str]) -> Path:
    """Where an evaluation keeps its records.

    Args:
        words: of its command line; it checks the others itself.

    Raises:
        UserError: `--out` stands without a folder.
    """
    parser = _Parser("--out FOLDER")
    parser.add_argument("--out", type=Path, default=USUAL)
    return records_under(parser.parse_known_args(list(words))[0].out)


class _Parser(argparse.ArgumentParser):
    """
    Args:
        form: of the words, for whoever gave others.
    """

    def __init__(self, form: str) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self._form = form

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; give {self._form}")
