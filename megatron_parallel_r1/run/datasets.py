"""The tokenizer of a recipe, the streams that its stages train on, and reports of its data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from megatron_parallel_r1.config.data import (
    BpeTokenizer,
    DataSet,
    DistilledTraces,
    EmbeddedArithmetic,
    EmbeddedColdStart,
    EmbeddedProblems,
    EmbeddedTokenizer,
    FolderTokenizer,
    Mixture,
    data_sets,
)
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.stages import DistillStage, RlStage, SftStage
from megatron_parallel_r1.data import tokenizers
from megatron_parallel_r1.data.account import account_table
from megatron_parallel_r1.data.decontaminate import contamination_table
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
from megatron_parallel_r1.run.sources import (
    contamination,
    drop_long,
    evaluation_problems,
    read_examples,
    read_problems,
    stage_examples,
    stage_items,
    stage_problems,
)
from megatron_parallel_r1.thought.format_settings import format_of
from megatron_parallel_r1.thought.layout import Row
from megatron_parallel_r1.utils.seeding import derive_seed, hash_seed
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
    sources += [settings.data for settings in recipe.evaluations().values()]
    generated = [source for source in sources if not isinstance(source, DistilledTraces)]
    if fields and not all(map(data_sets, generated)):
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
            sets = data_sets(stage.data)
            for problems in [stage_problems(recipe, data).in_order() for data in sets] or [iter(())]:
                columns = dict.fromkeys(name for problem in problems for name in problem.columns)
                for term in terms:
                    term.check_columns(columns)
    for where, settings in recipe.evaluations().items():
        held_out = evaluation_problems(settings.data, settings.problems, fields)
        evaluated = {problem.prompt for problem in held_out}
        for name, prompts in trained_on.items():
            if seen := evaluated & prompts:
                raise UserError(
                    f"{where}: stage {name} trains on {len(seen)} of its {len(evaluated)} problems, "
                    f"such as {min(seen)[:60]!r}; evaluate on others"
                )
    if isinstance(recipe.tokenizer, BpeTokenizer):
        for data in recipe.tokenizer.texts:
            _texts(data, recipe)


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
    """The digest of each stage's data sets, and of the evaluation's; embedded data have none.

    Those of a stage include what it is evaluated on while it trains.
    """
    template = recipe.prompt_template
    fields = template_columns(template)
    digests = {}
    for stage in recipe.stages:
        trained = (stage_items(recipe, stage, data).in_order() for data in data_sets(stage.data))
        evaluated = (
            evaluation_problems(settings.data, settings.problems, fields)
            for settings in stage.evaluation_sets.values()
            if data_sets(settings.data)
        )
        with_columns = isinstance(stage, RlStage) and bool(stage.reward.make().user_terms)
        digest = DataDigest.of(chain.from_iterable(chain(trained, evaluated)), template, with_columns)
        if digest.items:
            digests[stage.name] = digest
    if recipe.evaluation is not None and data_sets(recipe.evaluation.data):
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
            return build_embedded_tokenizer(format_of(recipe.thinking.format))
        case BpeTokenizer(vocab_size=vocab, texts=sets):
            return tokenizers.train_tokenizer(
                [text for data in sets for text in _texts(data, recipe)],
                vocab_size=vocab,
                format=format_of(recipe.thinking.format),
            )
        case FolderTokenizer() as settings:
            folder = settings.folder or recipe.model.folder
            if folder is None:
                raise UserError("tokenizer: give path, since model.path is not set either")
            return tokenizers.open_tokenizer(folder)


def contamination_report(recipe: Recipe) -> str:
    """Markdown report of each data set's overlap with held-out problems; empty without decontamination."""
    if recipe.decontamination is None:
        return ""
    parts = [
        f"## {stage.name}\n\n{contamination_table(contamination(recipe, data, stage.kind == 'sft'))}"
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

    Args:
        stage: its data are no `distilled` ones (`RunContext.with_traces`).

    Raises:
        UserError: a row is unusable (a malformed response, for one) and may not be skipped, or all examples
            exceed `max_example_tokens`.
    """
    assert not isinstance(stage.data, DistilledTraces)
    match stage.data:
        case EmbeddedArithmetic(easy=easy):
            return ProblemStream(lambda i: to_row(generate.arithmetic_example(easy, seed, i)), seed)
        case EmbeddedColdStart(easy=easy, style=style):
            format = format_of(recipe.thinking.format)
            return ProblemStream(
                lambda i: to_row(generate.cold_start_example(style, easy, seed, i, format)), seed
            )
        case DataSet() | Mixture():
            orders = [
                _row_order(recipe, stage, data, own_seed, to_row, cache)
                for data, own_seed in _seeded(stage.data, seed)
            ]
            return ProblemStream(_mixed(stage.data, orders, seed), seed)


def held_out_examples(recipe: Recipe, stage: SftStage, seed: int) -> list[Example]:
    """The worked examples that `example_rows` of the same arguments leaves out."""
    assert not isinstance(stage.data, DistilledTraces)
    own, numbers = derive_seed(seed, "held out"), range(stage.held_out_examples)
    match stage.data:
        case EmbeddedArithmetic(easy=easy):
            return [generate.arithmetic_example(easy, own, number) for number in numbers]
        case EmbeddedColdStart(easy=easy, style=style):
            format = format_of(recipe.thinking.format)
            return [generate.cold_start_example(style, easy, own, number, format) for number in numbers]
    found = []
    for data, own_seed in _seeded(stage.data, seed):
        examples = stage_examples(recipe, data)
        ids = _held_out_ids(stage, data, examples, own_seed)
        found += [example for example in examples.in_order() if example.problem.id in ids]
    return found


def _held_out_ids(
    stage: SftStage, data: DataSet, examples: LoadedDataset[Example] | StreamedDataset[Example], seed: int
) -> set[str]:
    """The ids of the examples of one data set that are not trained on, in a mixture by weight.

    Raises:
        UserError: no others would be left.
    """
    count = stage.held_out_examples
    if not count:
        return set()
    if isinstance(stage.data, Mixture):
        total = sum(other.weight for other in stage.data.sets)
        count = max(1, round(count * getattr(data, "weight", 1.0) / total))
    ids = sorted(
        (example.problem.id for example in examples.in_order()),
        key=lambda id: hash_seed(f"held out/{seed}/{id}"),
    )
    if len(ids) <= count:
        raise UserError(
            f"stage {stage.name}: held_out_examples takes {count} of the {len(ids)} examples of "
            f"{data.path or data.name}; lower it"
        )
    return set(ids[:count])


def _row_order(
    recipe: Recipe,
    stage: SftStage,
    data: DataSet,
    seed: int,
    to_row: Callable[[Example], Row],
    cache: RowCache,
) -> Callable[[int], Row]:
    """The endless order of one data set's laid-out examples."""
    most, examples = recipe.max_example_tokens, stage_examples(recipe, data)
    if held_out := _held_out_ids(stage, data, examples, seed):
        examples = examples.without(held_out)
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
    recipe: Recipe, stage: RlStage | DistillStage, seed: int, prompt_tokens: Callable[[Problem], int]
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
                problems = stage_problems(recipe, data)
                if (most := recipe.max_prompt_tokens) is not None:
                    problems = drop_long(problems, prompt_tokens, most, stage.name, "max_prompt_tokens")
                orders.append(problems.shuffled(own_seed))
            return ProblemStream(_mixed(stage.data, orders, seed), seed)


def _texts(source: DataSet, recipe: Recipe) -> list[str]:
    """The prompts and responses of a data set, to train a tokenizer on."""
    template = recipe.prompt_template
    fields = template_columns(template)
    if schema_of(source.name, source.columns).response is None:
        return [render(template, problem) for problem in read_problems(source, fields).in_order()]
    examples = read_examples(source, fields, format_of(recipe.thinking.format)).in_order()
    return [f"{render(template, example.problem)}\n{example.response}" for example in examples]
