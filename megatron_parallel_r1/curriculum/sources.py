"""From a recipe's words to tokenizer, problems and examples."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from megatron_parallel_r1 import config
from megatron_parallel_r1.data import bpe, readers
from megatron_parallel_r1.data.embedded import generate
from megatron_parallel_r1.data.embedded.tokenizer import build_tokenizer as build_embedded_tokenizer
from megatron_parallel_r1.data.problems import Example, Problem
from megatron_parallel_r1.data.prompts import render
from megatron_parallel_r1.data.readers import Reading
from megatron_parallel_r1.data.sampler import ProblemStream
from megatron_parallel_r1.data.schemas import schema_of
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.layout import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T", Problem, Example)


def check_sources(recipe: config.Recipe) -> None:
    """Reads every data set that the recipe names, so that a bad one stops the run before it begins.

    Raises:
        UserError: a file is missing, a row is unusable and none may be skipped, or an evaluation problem is
            trained on.
    """
    trained_on = {stage.name: _questions(stage) for stage in recipe.stages}
    if recipe.evaluation is not None:
        held_out = evaluation_problems(recipe.evaluation.data, recipe.evaluation.count)
        asked = {problem.prompt for problem in held_out}
        for stage, questions in trained_on.items():
            if seen := asked & questions:
                raise UserError(
                    f"evaluation: stage {stage} trains on {len(seen)} of its {len(asked)} problems, "
                    f"such as {min(seen)[:60]!r}; evaluate on others"
                )
    if isinstance(recipe.tokenizer, config.BpeTokenizer):
        for data in recipe.tokenizer.texts:
            _texts(data, recipe.prompt)


def load_tokenizer(recipe: config.Recipe) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, before the tags are added.

    Raises:
        UserError: the folder holds no tokenizer, or a data set cannot be read.
    """
    match recipe.tokenizer:
        case config.EmbeddedTokenizer():
            return build_embedded_tokenizer()
        case config.BpeTokenizer(vocab=vocab, texts=sets):
            return bpe.train_tokenizer(
                [text for data in sets for text in _texts(data, recipe.prompt)], vocab_size=vocab
            )
        case config.FolderTokenizer(path=path):
            folder = path or recipe.model.path
            if folder is None:
                raise UserError("tokenizer: give path, since model.path is not set either")
            return open_tokenizer(folder)


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a Hugging Face folder.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder}: no tokenizer here (tokenizer_config.json is missing); give its folder")
    return AutoTokenizer.from_pretrained(folder)


def example_rows(
    source: config.ExampleSource, seed: int, to_row: Callable[[Example], Row]
) -> ProblemStream[Row]:
    """Worked examples without end, laid out; those of a data set are laid out once.

    Raises:
        UserError: a row of a data set is unusable, its response malformed included, and none may be skipped.
    """
    match source:
        case config.EmbeddedArithmetic(easy=easy):
            return ProblemStream(lambda i: to_row(generate.arithmetic_example(easy, seed, i)), seed)
        case config.EmbeddedColdStart(easy=easy, style=style):
            return ProblemStream(lambda i: to_row(generate.cold_start_example(style, easy, seed, i)), seed)
        case config.DataSet():
            return ProblemStream([to_row(example) for example in _rows(source, readers.read_examples)], seed)


def problem_stream(source: config.ProblemSource, seed: int) -> ProblemStream[Problem]:
    """Problems to train on, without end."""
    match source:
        case config.EmbeddedProblems(kind=kind):
            return ProblemStream(partial(generate.training_problem, kind, seed), seed)
        case config.DataSet():
            return ProblemStream(_rows(source, readers.read_problems), seed)


def evaluation_problems(source: config.ProblemSource, count: int) -> tuple[Problem, ...]:
    """Problems to evaluate on: the embedded curriculum's held-out ones, or a data set's first `count`."""
    match source:
        case config.EmbeddedProblems(kind=kind):
            return generate.evaluation_problems(kind, count)
        case config.DataSet():
            return tuple(_rows(source, readers.read_problems)[:count])


def _questions(stage: config.SftStage | config.RlStage) -> set[str]:
    """All questions of a stage's data set; the embedded curriculum keeps its own apart by construction."""
    if not isinstance(stage.data, config.DataSet):
        return set()
    if isinstance(stage, config.SftStage):
        return {example.problem.prompt for example in _rows(stage.data, readers.read_examples)}
    return {problem.prompt for problem in _rows(stage.data, readers.read_problems)}


@lru_cache(maxsize=16)
def _rows(source: config.DataSet, read: Callable[..., Reading[T]]) -> tuple[T, ...]:
    reading = read(source.name, source.path, limit=source.limit, bad_rows=source.bad_rows)
    dropped = {"unusable": len(reading.bad), "repeated": reading.repeated, "disputed": reading.disputed}
    _report(source, len(reading.items), dropped)
    return reading.items


def _texts(source: config.DataSet, template: str) -> list[str]:
    """All that a model trained on the data set reads and writes."""
    if schema_of(source.name).response is None:
        return [render(template, problem.prompt) for problem in _rows(source, readers.read_problems)]
    examples = _rows(source, readers.read_examples)
    return [f"{render(template, example.problem.prompt)}\n{example.response}" for example in examples]


def _report(source: config.DataSet, kept: int, dropped: dict[str, int]) -> None:
    """Says on standard error what was left out, if anything was."""
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    if counts:
        print(f"{source.path or source.name}: {kept} rows kept, left out: {counts}", file=sys.stderr)
