"""Reads the data sets of a recipe, each once, and leaves out what overlaps with evaluation problems."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar

from megatron_parallel_r1.config.data import (
    DataSet,
    Decontamination,
    EmbeddedProblems,
    Mixture,
    ProblemSource,
    data_sets,
)
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.stages import AnyStage, SftStage
from megatron_parallel_r1.data import readers
from megatron_parallel_r1.data.account import RowAccount, account_table
from megatron_parallel_r1.data.decontaminate import Contamination, find_contamination
from megatron_parallel_r1.data.embedded import generate
from megatron_parallel_r1.data.problems import Example, Problem
from megatron_parallel_r1.data.prompts import template_columns
from megatron_parallel_r1.data.readers import LoadedDataset
from megatron_parallel_r1.data.source import StreamedDataset, problem_of
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.format_settings import format_of
from megatron_parallel_r1.thought.formats import ThinkingFormat
from megatron_parallel_r1.utils.rank import is_rank_zero

T = TypeVar("T", Problem, Example)


def evaluation_problems(
    source: ProblemSource, count: int, fields: tuple[str, ...] = ()
) -> tuple[Problem, ...]:
    """Evaluation problems: held-out ones of the embedded curriculum, or the first `count` of a data set.

    Args:
        fields: columns that the rows must have, for the prompt template.
    """
    match source:
        case EmbeddedProblems(kind=kind):
            return generate.evaluation_problems(kind, count)
        case DataSet():
            return tuple(islice(read_problems(source, fields).in_order(), count))
        case Mixture():
            return _first_of_each(source, count, fields)


def _first_of_each(mixture: Mixture, count: int, fields: tuple[str, ...]) -> tuple[Problem, ...]:
    """The first problems of each set, in proportion to the weights while all last; ids name the source."""
    sets = [list(islice(read_problems(data, fields).in_order(), count)) for data in mixture.sets]
    weights, taken = [data.weight for data in mixture.sets], [0] * len(sets)
    problems: list[Problem] = []
    while len(problems) < min(count, sum(map(len, sets))):
        left = [k for k, items in enumerate(sets) if taken[k] < len(items)]
        behind = min(left, key=lambda k: (taken[k] + 1) / weights[k])
        problem = sets[behind][taken[behind]]
        problems.append(replace(problem, id=f"{problem.source}:{problem.id}"))
        taken[behind] += 1
    return tuple(problems)


def stage_items(recipe: Recipe, stage: AnyStage, data: DataSet) -> LoadedDataset[Any] | StreamedDataset[Any]:
    """The problems, or in SFT the worked examples, of one of a stage's data sets, after decontamination."""
    return stage_examples(recipe, data) if isinstance(stage, SftStage) else stage_problems(recipe, data)


def stage_problems(recipe: Recipe, data: DataSet) -> LoadedDataset[Problem] | StreamedDataset[Problem]:
    problems = read_problems(data, template_columns(recipe.prompt_template))
    return _decontaminated(problems, recipe, data, is_sft=False)


def stage_examples(recipe: Recipe, data: DataSet) -> LoadedDataset[Example] | StreamedDataset[Example]:
    format = format_of(recipe.thinking.format)
    examples = read_examples(data, template_columns(recipe.prompt_template), format)
    return _decontaminated(examples, recipe, data, is_sft=True)


def _decontaminated(
    items: LoadedDataset[T] | StreamedDataset[T], recipe: Recipe, data: DataSet, is_sft: bool
) -> LoadedDataset[T] | StreamedDataset[T]:
    if recipe.decontamination is None:
        return items
    return items.without(contamination(recipe, data, is_sft).rows())


def contamination(recipe: Recipe, data: DataSet, is_sft: bool) -> Contamination:
    assert recipe.decontamination is not None
    fields = template_columns(recipe.prompt_template)
    format = format_of(recipe.thinking.format)
    held_out = tuple((settings.data, settings.problems) for settings in recipe.evaluations().values())
    return _overlap(data, is_sft, recipe.decontamination, held_out, fields, format)


@lru_cache(maxsize=16)
def _overlap(
    source: DataSet,
    is_sft: bool,
    settings: Decontamination,
    evaluations: tuple[tuple[ProblemSource, int], ...],
    fields: tuple[str, ...],
    format: ThinkingFormat,
) -> Contamination:
    held_out = [problem for other in settings.against for problem in read_problems(other, ()).in_order()]
    for data, count in evaluations:
        if data_sets(data):
            held_out += evaluation_problems(data, count, fields)
    trained = (
        (example.problem for example in read_examples(source, fields, format).in_order())
        if is_sft
        else read_problems(source, fields).in_order()
    )
    overlap = find_contamination(
        trained, held_out, settings.ngram_size, settings.max_problems_per_ngram, settings.min_overlap
    )
    if overlap.overlaps:
        dropped = (
            f"{len(overlap.rows())} of {overlap.training_count} problems overlap with evaluation problems"
        )
        print(f"{source.path or source.name}: {dropped}, left out", file=sys.stderr)
    return overlap


@lru_cache(maxsize=16)
def read_problems(
    source: DataSet, fields: tuple[str, ...]
) -> LoadedDataset[Problem] | StreamedDataset[Problem]:
    options = source.read_options(fields)
    problems: LoadedDataset[Problem] | StreamedDataset[Problem]
    if source.buffer is None:
        problems = readers.read_problems(source.name, source.path, **options)
    else:
        problems = readers.stream_problems(source.name, source.path, buffer=source.buffer, **options)
    _report(problems.account, source)
    return problems


@lru_cache(maxsize=16)
def read_examples(
    source: DataSet, fields: tuple[str, ...], format: ThinkingFormat
) -> LoadedDataset[Example] | StreamedDataset[Example]:
    options = source.read_options(fields)
    options["format"] = format
    examples: LoadedDataset[Example] | StreamedDataset[Example]
    if source.buffer is None:
        examples = readers.read_examples(source.name, source.path, **options)
    else:
        examples = readers.stream_examples(source.name, source.path, buffer=source.buffer, **options)
    _report(examples.account, source)
    return examples


def _report(account: RowAccount, source: DataSet) -> None:
    """Prints to standard error which rows were skipped and why; repeats and contradictions, if any, unless
    the recipe says itself whether they are dropped."""
    if is_rank_zero():
        if account.bad:
            print(account_table([account]), end="", file=sys.stderr)
        for note in account.notes() if source.drop_repeats is None else ():
            print(note, file=sys.stderr)


def drop_long(
    items: LoadedDataset[T] | StreamedDataset[T],
    tokens: Callable[[T], int],
    most: int,
    stage: str,
    setting: str,
) -> LoadedDataset[T] | StreamedDataset[T]:
    """Drops items of more than `most` tokens and reports their number; reads all items once.

    Args:
        stage, setting: the stage, and the recipe key of `most`, for messages.

    Raises:
        UserError: no item is left.
    """
    count, long = 0, set()
    for item in items.in_order():
        count += 1
        if tokens(item) > most:
            long.add(problem_of(item).id)
    if len(long) == count:
        raise UserError(f"stage {stage}: nothing of its data has at most {most:,} tokens; raise {setting}")
    if long and is_rank_zero():
        dropped = f"{len(long)} of {count} have more than {most:,} tokens ({setting}), left out"
        print(f"stage {stage}: {dropped}", file=sys.stderr)
    return items.without(long)
