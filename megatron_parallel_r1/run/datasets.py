"""From a recipe's words to tokenizer, problems and examples."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from megatron_parallel_r1.config.data import (
    BpeTokenizer,
    DataSet,
    Decontamination,
    EmbeddedArithmetic,
    EmbeddedColdStart,
    EmbeddedProblems,
    EmbeddedTokenizer,
    FolderTokenizer,
    ProblemSource,
)
from megatron_parallel_r1.config.recipe import Evaluation, Recipe
from megatron_parallel_r1.config.stages import RlStage, SftStage
from megatron_parallel_r1.data import readers, tokenizers
from megatron_parallel_r1.data.account import Account, account_table
from megatron_parallel_r1.data.decontaminate import Contamination, contamination, contamination_table
from megatron_parallel_r1.data.embedded import generate
from megatron_parallel_r1.data.embedded.generate import build_tokenizer as build_embedded_tokenizer
from megatron_parallel_r1.data.problems import Example, Problem
from megatron_parallel_r1.data.prompts import render
from megatron_parallel_r1.data.readers import Reading
from megatron_parallel_r1.data.row_cache import RowCache
from megatron_parallel_r1.data.sampler import ProblemStream
from megatron_parallel_r1.data.schemas import schema_of
from megatron_parallel_r1.data.source import Streamed, problem_of
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.layout import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["problems", "examples"]
DataRead = Reading[Problem] | Reading[Example] | Streamed[Problem] | Streamed[Example]


def check_sources(recipe: Recipe) -> None:
    """Reads every data set that the recipe names, so that a bad one stops the run before it begins.

    Raises:
        UserError: a file is missing, a row is unusable and none may be skipped, a stage has nothing to train
            on, or an evaluation problem is trained on.
    """
    trained_on = {stage.name: _questions(recipe, stage) for stage in recipe.stages}
    for stage in recipe.stages:
        if isinstance(stage.data, DataSet) and not trained_on[stage.name]:
            raise UserError(
                f"stage {stage.name}: nothing of {stage.data.path or stage.data.name} is left to train on; "
                "give another data set, or evaluate on other problems"
            )
    if recipe.evaluation is not None:
        held_out = evaluation_problems(recipe.evaluation.data, recipe.evaluation.problems)
        asked = {problem.prompt for problem in held_out}
        for stage, questions in trained_on.items():
            if seen := asked & questions:
                raise UserError(
                    f"evaluation: stage {stage} trains on {len(seen)} of its {len(asked)} problems, "
                    f"such as {min(seen)[:60]!r}; evaluate on others"
                )
    if isinstance(recipe.tokenizer, BpeTokenizer):
        for data in recipe.tokenizer.texts:
            _texts(data, recipe.prompt_template)


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, before the tags are added.

    Raises:
        UserError: the folder holds no tokenizer, or a data set cannot be read.
    """
    match recipe.tokenizer:
        case EmbeddedTokenizer():
            return build_embedded_tokenizer()
        case BpeTokenizer(vocab_size=vocab, texts=sets):
            return tokenizers.train_tokenizer(
                [text for data in sets for text in _texts(data, recipe.prompt_template)], vocab_size=vocab
            )
        case FolderTokenizer(path=path):
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


def contamination_report(recipe: Recipe) -> str:
    """Markdown: what each stage's data set has in common with the problems held out; empty without any."""
    parts = [
        f"## {stage.name}\n\n{contamination_table(_contamination(recipe, stage))}"
        for stage in recipe.stages
        if recipe.decontamination is not None and isinstance(stage.data, DataSet)
    ]
    return "\n".join(parts)


def example_rows(
    recipe: Recipe,
    stage: SftStage,
    seed: int,
    to_row: Callable[[Example], Row],
    cache: RowCache,
) -> ProblemStream[Row]:
    """Worked examples without end, laid out; those of a data set that is in memory come from `cache`.

    Raises:
        UserError: a row of a data set is unusable, its response malformed included, and none may be skipped;
            all are longer than the recipe allows.
    """
    most = recipe.max_example_tokens
    match stage.data:
        case EmbeddedArithmetic(easy=easy):
            return ProblemStream(lambda i: to_row(generate.arithmetic_example(easy, seed, i)), seed)
        case EmbeddedColdStart(easy=easy, style=style):
            return ProblemStream(lambda i: to_row(generate.cold_start_example(style, easy, seed, i)), seed)
        case DataSet():
            examples = _apart(recipe, stage)
            if isinstance(examples, Reading):
                rows = cache.rows(examples.items, to_row)
                if most is not None:
                    by_id = {item.problem.id: row for item, row in zip(examples.items, rows, strict=True)}
                    kept = without_long(
                        examples, lambda e: len(by_id[e.problem.id]), most, stage.name, "max_example_tokens"
                    )
                    rows = [by_id[item.problem.id] for item in kept.in_order()]
                return ProblemStream(rows, seed)
            if most is not None:
                examples = without_long(
                    examples, lambda e: len(to_row(e)), most, stage.name, "max_example_tokens"
                )
            at = examples.shuffled(seed)
            return ProblemStream(lambda i: to_row(at(i)), seed)


def problem_stream(
    recipe: Recipe, stage: RlStage, seed: int, prompt_tokens: Callable[[Problem], int]
) -> ProblemStream[Problem]:
    """Problems to train on, without end.

    Args:
        prompt_tokens: how many a problem's prompt has.

    Raises:
        UserError: all prompts are longer than the recipe allows.
    """
    match stage.data:
        case EmbeddedProblems(kind=kind):
            return ProblemStream(partial(generate.training_problem, kind, seed), seed)
        case DataSet():
            problems = _apart(recipe, stage)
            if (most := recipe.max_prompt_tokens) is not None:
                problems = without_long(problems, prompt_tokens, most, stage.name, "max_prompt_tokens")
            return ProblemStream(problems.shuffled(seed), seed)


def evaluation_problems(source: ProblemSource, count: int) -> tuple[Problem, ...]:
    """Problems to evaluate on: the embedded curriculum's held-out ones, or a data set's first `count`."""
    match source:
        case EmbeddedProblems(kind=kind):
            return generate.evaluation_problems(kind, count)
        case DataSet():
            return tuple(islice(_read(source, "problems").in_order(), count))


def _questions(recipe: Recipe, stage: SftStage | RlStage) -> set[str]:
    """All questions of a stage's data set; the embedded curriculum keeps its own apart by construction."""
    if not isinstance(stage.data, DataSet):
        return set()
    return {problem_of(item).prompt for item in _apart(recipe, stage).in_order()}


def _apart(recipe: Recipe, stage: SftStage | RlStage) -> DataRead:
    """A stage's data set, without what the recipe has decontamination leave out."""
    whole = _read(stage.data, _kind(stage))
    if recipe.decontamination is None:
        return whole
    return whole.without(_contamination(recipe, stage).rows())


def _contamination(recipe: Recipe, stage: SftStage | RlStage) -> Contamination:
    return _overlap(stage.data, _kind(stage), recipe.decontamination, recipe.evaluation)


@lru_cache(maxsize=16)
def _overlap(
    source: DataSet,
    kind: Kind,
    asked: Decontamination,
    evaluation: Evaluation | None,
) -> Contamination:
    held_out = [problem for data in asked.against for problem in _read(data, "problems").in_order()]
    if evaluation is not None and isinstance(evaluation.data, DataSet):
        held_out += evaluation_problems(evaluation.data, evaluation.problems)
    trained = map(problem_of, _read(source, kind).in_order())
    found = contamination(
        trained, held_out, asked.ngram_size, asked.max_problems_per_ngram, asked.min_overlap
    )
    if found.overlaps:
        left_out = f"{len(found.rows())} of {found.checked} problems overlap with evaluation problems"
        print(f"{source.path or source.name}: {left_out}, left out", file=sys.stderr)
    return found


def _kind(stage: SftStage | RlStage) -> Kind:
    return "examples" if isinstance(stage, SftStage) else "problems"


@lru_cache(maxsize=16)
def _read(source: DataSet, kind: Kind) -> DataRead:
    if source.buffer is None:
        read = readers.read_examples if kind == "examples" else readers.read_problems
    else:
        stream = readers.stream_examples if kind == "examples" else readers.stream_problems
        read = partial(stream, buffer=source.buffer)
    whole = read(
        source.name,
        source.path,
        columns=source.columns,
        split=source.split,
        limit=source.limit,
        bad_rows=source.bad_rows,
    )
    _report(whole.account)
    return whole


def _texts(source: DataSet, template: str) -> list[str]:
    """All that a model trained on the data set reads and writes."""
    if schema_of(source.name, source.columns).response is None:
        return [render(template, problem.prompt) for problem in _read(source, "problems").in_order()]
    examples = _read(source, "examples").in_order()
    return [f"{render(template, example.problem.prompt)}\n{example.response}" for example in examples]


def _report(account: Account) -> None:
    """Says on standard error what was left out and why, if anything was."""
    if account.kept < account.rows:
        print(account_table([account]), end="", file=sys.stderr)


T = TypeVar("T", Problem, Example)


def without_long(
    items: Reading[T] | Streamed[T], tokens: Callable[[T], int], most: int, stage: str, setting: str
) -> Reading[T] | Streamed[T]:
    """The items of at most so many tokens; goes through all of them once.

    Args:
        stage, setting: whose they are and what sets `most`, for messages.

    Raises:
        UserError: all are longer.
    """
    # It brings Megatron, which a command that only reads need not wait for.
    from megatron_parallel_r1.utils.rank import is_rank_zero

    count, longer = 0, set()
    for item in items.in_order():
        count += 1
        if tokens(item) > most:
            longer.add(problem_of(item).id)
    if len(longer) == count:
        raise UserError(f"stage {stage}: nothing of its data has at most {most:,} tokens; raise {setting}")
    if longer and is_rank_zero():
        left_out = f"{len(longer)} of {count} have more than {most:,} tokens ({setting}), left out"
        print(f"stage {stage}: {left_out}", file=sys.stderr)
    return items.without(longer)
