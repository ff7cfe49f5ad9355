"""Loads the tokenizer and the data sets that a recipe names."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_parallel_r1.config.data import (
    BpeTokenizer,
    DataSet,
    Decontamination,
    EmbeddedArithmetic,
    EmbeddedColdStart,
    EmbeddedProblems,
    EmbeddedTokenizer,
    FolderTokenizer,
    Mixture,
    ProblemSource,
    data_sets,
)
from megatron_parallel_r1.config.recipe import Evaluation, Recipe
from megatron_parallel_r1.config.stages import RlStage, SftStage
from megatron_parallel_r1.data import readers, tokenizers
from megatron_parallel_r1.data.account import RowAccount, account_table
from megatron_parallel_r1.data.decontaminate import Contamination, contamination_table, find_contamination
from megatron_parallel_r1.data.embedded import generate
from megatron_parallel_r1.data.embedded.generate import build_tokenizer as build_embedded_tokenizer
from megatron_parallel_r1.data.problems import Example, Problem
from megatron_parallel_r1.data.prompts import messages_of, render, template_columns
from megatron_parallel_r1.data.readers import LoadedDataset
from megatron_parallel_r1.data.row_cache import RowCache
from megatron_parallel_r1.data.sampler import MixedOrder, ProblemStream, ShuffledEpochs
from megatron_parallel_r1.data.schemas import schema_of
from megatron_parallel_r1.data.source import StreamedDataset, problem_of
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.layout import Row
from megatron_parallel_r1.utils.rank import is_rank_zero
from megatron_parallel_r1.utils.seeding import derive_seed
from megatron_parallel_r1.utils.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T", Problem, Example)
A = TypeVar("A")
# The key of the evaluation among stages, none of which can have such a name.
EVALUATION = "(evaluation)"


def check_sources(recipe: Recipe) -> None:
    """Reads every data set of the recipe, so that a bad one stops the run before it starts.

    Raises:
        UserError: a file is missing, a row is unusable and may not be skipped, a stage has no data left to
            train on or lacks a column that its reward needs, or an evaluation problem is also a training
            problem.
    """
    fields = template_columns(recipe.prompt_template)
    sources: list[Settings] = [stage.data for stage in recipe.stages]
    if recipe.evaluation is not None:
        sources.append(recipe.evaluation.data)
    if fields and not all(map(data_sets, sources)):
        raise UserError(f"prompt_template: shows {', '.join(fields)}, but embedded problems have no columns")
    trained_on: dict[str, set[str]] = {stage.name: set() for stage in recipe.stages}
    for stage in recipe.stages:
        for data in data_sets(stage.data):
            prompts = {problem_of(item).prompt for item in stage_items(recipe, stage, data).in_order()}
            if not prompts:
                raise UserError(
                    f"stage {stage.name}: nothing of {data.path or data.name} is left to train on; "
                    "give another data set, or evaluate on other problems"
                )
            trained_on[stage.name] |= prompts
        if isinstance(stage, RlStage) and (terms := stage.reward.make().user_terms):
            for problems in [_problems(recipe, d).in_order() for d in data_sets(stage.data)] or [iter(())]:
                columns = dict.fromkeys(name for problem in problems for name in problem.columns)
                for term in terms:
                    term.check_columns(columns)
    if recipe.evaluation is not None:
        held_out = evaluation_problems(recipe.evaluation.data, recipe.evaluation.problems, fields)
        evaluated = {problem.prompt for problem in held_out}
        for name, prompts in trained_on.items():
            if seen := evaluated & prompts:
                raise UserError(
                    f"evaluation: stage {name} trains on {len(seen)} of its {len(evaluated)} problems, "
                    f"such as {min(seen)[:60]!r}; evaluate on others"
                )
    if isinstance(recipe.tokenizer, BpeTokenizer):
        for data in recipe.tokenizer.texts:
            _texts(data, recipe.prompt_template)


@dataclass(frozen=True, slots=True)
class DataDigest:
    """The number of items of a data set, and the SHA-256 of what a model and its rewards see of them."""

    items: int
    sha256: str

    @classmethod
    def of(cls, items: Iterable[Problem | Example], template: str, with_columns: bool = False) -> DataDigest:
        """Digests items in their order.

        Args:
            template: the prompt template.
            with_columns: include all columns, of which a reward of the user's own may read any.
        """
        digest, count = hashlib.sha256(), 0
        for item in items:
            problem, response = problem_of(item), item.response if isinstance(item, Example) else None
            columns = dict(problem.columns) if with_columns else None
            seen = [messages_of(template, problem), problem.answers, response, columns]
            digest.update(json.dumps(seen, sort_keys=True, default=str).encode())
            count += 1
        return cls(count, digest.hexdigest())


def data_digests(recipe: Recipe) -> dict[str, DataDigest]:
    """The digest of each stage's data sets, and of the evaluation's; embedded data have none."""
    template = recipe.prompt_template
    digests = {
        stage.name: DataDigest.of(
            (item for data in sets for item in stage_items(recipe, stage, data).in_order()),
            template,
            with_columns=isinstance(stage, RlStage) and bool(stage.reward.make().user_terms),
        )
        for stage in recipe.stages
        if (sets := data_sets(stage.data))
    }
    if recipe.evaluation is not None and data_sets(recipe.evaluation.data):
        fields = template_columns(template)
        digests[EVALUATION] = DataDigest.of(
            evaluation_problems(recipe.evaluation.data, recipe.evaluation.problems, fields), template
        )
    return digests


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
            return tokenizers.open_tokenizer(folder)


def contamination_report(recipe: Recipe) -> str:
    """Markdown report of each data set's overlap with held-out problems; empty without decontamination."""
    if recipe.decontamination is None:
        return ""
    parts = [
        f"## {stage.name}\n\n{contamination_table(_contamination(recipe, data, stage.kind == 'sft'))}"
        for stage in recipe.stages
        for data in data_sets(stage.data)
    ]
    return "\n".join(parts)


def data_report(recipe: Recipe) -> str:
    """Markdown report of the rows that each stage keeps, drops and repeats; empty if all is embedded."""
    parts = []
    for stage in recipe.stages:
        accounts = [stage_items(recipe, stage, data).account for data in data_sets(stage.data)]
        notes = [f"- {note}\n" for account in accounts for note in account.notes()]
        if accounts:
            parts.append(
                f"## {stage.name}\n\n{account_table(accounts)}" + "".join(["\n", *notes] * bool(notes))
            )
    return "\n".join(parts)


def example_rows(
    recipe: Recipe,
    stage: SftStage,
    seed: int,
    to_row: Callable[[Example], Row],
    cache: RowCache,
) -> ProblemStream[Row]:
    """An endless stream of laid-out worked examples; rows of an in-memory data set come from `cache`.

    Raises:
        UserError: a row is unusable (a malformed response, for one) and may not be skipped, or all examples
            exceed `max_example_tokens`.
    """
    match stage.data:
        case EmbeddedArithmetic(easy=easy):
            return ProblemStream(lambda i: to_row(generate.arithmetic_example(easy, seed, i)), seed)
        case EmbeddedColdStart(easy=easy, style=style):
            return ProblemStream(lambda i: to_row(generate.cold_start_example(style, easy, seed, i)), seed)
        case DataSet() | Mixture():
            orders = [
                _row_order(recipe, stage, data, own_seed, to_row, cache)
                for data, own_seed in _seeded(stage.data, seed)
            ]
            return ProblemStream(_mixed(stage.data, orders, seed), seed)


def _row_order(
    recipe: Recipe,
    stage: SftStage,
    data: DataSet,
    seed: int,
    to_row: Callable[[Example], Row],
    cache: RowCache,
) -> Callable[[int], Row]:
    """The endless order of one data set's laid-out examples."""
    most, examples = recipe.max_example_tokens, _examples(recipe, data)
    if isinstance(examples, LoadedDataset):
        rows = cache.rows(examples.items, to_row)
        if most is not None:
            by_id = {item.problem.id: row for item, row in zip(examples.items, rows, strict=True)}
            kept = drop_long(
                examples, lambda e: len(by_id[e.problem.id]), most, stage.name, "max_example_tokens"
            )
            rows = [by_id[item.problem.id] for item in kept.in_order()]
        return ShuffledEpochs(rows, seed)
    if most is not None:
        examples = drop_long(examples, lambda e: len(to_row(e)), most, stage.name, "max_example_tokens")
    at = examples.shuffled(seed)
    return lambda i: to_row(at(i))


def _seeded(source: DataSet | Mixture, seed: int) -> list[tuple[DataSet, int]]:
    """The data sets of a source, each with the seed of its order."""
    if isinstance(source, DataSet):
        return [(source, seed)]
    return [(data, derive_seed(seed, str(index))) for index, data in enumerate(source.sets)]


def _mixed(source: DataSet | Mixture, orders: Sequence[Callable[[int], A]], seed: int) -> Callable[[int], A]:
    if isinstance(source, DataSet):
        return orders[0]
    return MixedOrder(orders, [data.weight for data in source.sets], seed)


def problem_stream(
    recipe: Recipe, stage: RlStage, seed: int, prompt_tokens: Callable[[Problem], int]
) -> ProblemStream[Problem]:
    """An endless stream of training problems.

    Args:
        prompt_tokens: returns the number of tokens of a problem's prompt.

    Raises:
        UserError: all prompts exceed `max_prompt_tokens`.
    """
    match stage.data:
        case EmbeddedProblems(kind=kind):
            return ProblemStream(partial(generate.training_problem, kind, seed), seed)
        case DataSet() | Mixture():
            orders = []
            for data, own_seed in _seeded(stage.data, seed):
                problems = _problems(recipe, data)
                if (most := recipe.max_prompt_tokens) is not None:
                    problems = drop_long(problems, prompt_tokens, most, stage.name, "max_prompt_tokens")
                orders.append(problems.shuffled(own_seed))
            return ProblemStream(_mixed(stage.data, orders, seed), seed)


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
            return tuple(islice(_read_problems(source, fields).in_order(), count))
        case Mixture():
            return _first_of_each(source, count, fields)


def _first_of_each(mixture: Mixture, count: int, fields: tuple[str, ...]) -> tuple[Problem, ...]:
    """The first problems of each set, in proportion to the weights while all last; ids name the source."""
    sets = [list(islice(_read_problems(data, fields).in_order(), count)) for data in mixture.sets]
    weights, taken = [data.weight for data in mixture.sets], [0] * len(sets)
    problems: list[Problem] = []
    while len(problems) < min(count, sum(map(len, sets))):
        left = [k for k, items in enumerate(sets) if taken[k] < len(items)]
        behind = min(left, key=lambda k: (taken[k] + 1) / weights[k])
        problem = sets[behind][taken[behind]]
        problems.append(replace(problem, id=f"{problem.source}:{problem.id}"))
        taken[behind] += 1
    return tuple(problems)


def stage_items(
    recipe: Recipe, stage: SftStage | RlStage, data: DataSet
) -> LoadedDataset[Any] | StreamedDataset[Any]:
    """The problems, or in SFT the worked examples, of one of a stage's data sets, after decontamination."""
    return _examples(recipe, data) if isinstance(stage, SftStage) else _problems(recipe, data)


def _problems(recipe: Recipe, data: DataSet) -> LoadedDataset[Problem] | StreamedDataset[Problem]:
    problems = _read_problems(data, template_columns(recipe.prompt_template))
    return _decontaminated(problems, recipe, data, is_sft=False)


def _examples(recipe: Recipe, data: DataSet) -> LoadedDataset[Example] | StreamedDataset[Example]:
    examples = _read_examples(data, template_columns(recipe.prompt_template))
    return _decontaminated(examples, recipe, data, is_sft=True)


def _decontaminated(
    items: LoadedDataset[T] | StreamedDataset[T], recipe: Recipe, data: DataSet, is_sft: bool
) -> LoadedDataset[T] | StreamedDataset[T]:
    if recipe.decontamination is None:
        return items
    return items.without(_contamination(recipe, data, is_sft).rows())


def _contamination(recipe: Recipe, data: DataSet, is_sft: bool) -> Contamination:
    assert recipe.decontamination is not None
    fields = template_columns(recipe.prompt_template)
    return _overlap(data, is_sft, recipe.decontamination, recipe.evaluation, fields)


@lru_cache(maxsize=16)
def _overlap(
    source: DataSet,
    is_sft: bool,
    settings: Decontamination,
    evaluation: Evaluation | None,
    fields: tuple[str, ...],
) -> Contamination:
    held_out = [problem for data in settings.against for problem in _read_problems(data, ()).in_order()]
    if evaluation is not None and data_sets(evaluation.data):
        held_out += evaluation_problems(evaluation.data, evaluation.problems, fields)
    trained = (
        (example.problem for example in _read_examples(source, fields).in_order())
        if is_sft
        else _read_problems(source, fields).in_order()
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
def _read_problems(
    source: DataSet, fields: tuple[str, ...]
) -> LoadedDataset[Problem] | StreamedDataset[Problem]:
    options = source.read_options(fields)
    problems: LoadedDataset[Problem] | StreamedDataset[Problem]
    if source.buffer is None:
        problems = readers.read_problems(source.name, source.path, **options)
    else:
        problems = readers.stream_problems(source.name, source.path, buffer=source.buffer, **options)
    _report(problems.account)
    return problems


@lru_cache(maxsize=16)
def _read_examples(
    source: DataSet, fields: tuple[str, ...]
) -> LoadedDataset[Example] | StreamedDataset[Example]:
    options = source.read_options(fields)
    examples: LoadedDataset[Example] | StreamedDataset[Example]
    if source.buffer is None:
        examples = readers.read_examples(source.name, source.path, **options)
    else:
        examples = readers.stream_examples(source.name, source.path, buffer=source.buffer, **options)
    _report(examples.account)
    return examples


def _texts(source: DataSet, template: str) -> list[str]:
    """The prompts and responses of a data set, to train a tokenizer on."""
    fields = template_columns(template)
    if schema_of(source.name, source.columns).response is None:
        return [render(template, problem) for problem in _read_problems(source, fields).in_order()]
    examples = _read_examples(source, fields).in_order()
    return [f"{render(template, example.problem)}\n{example.response}" for example in examples]


def _report(account: RowAccount) -> None:
    """Prints to standard error which rows were skipped and why, repeats and contradictions, if any."""
    if is_rank_zero():
        if account.bad:
            print(account_table([account]), end="", file=sys.stderr)
        for note in account.notes():
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
