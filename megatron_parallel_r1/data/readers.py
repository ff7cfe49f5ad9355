"""Reads a data set into problems or worked examples, and accounts for every row.

`read_*` keeps all items in memory. `stream_*` reads the files once, keeps only the numbers of usable rows,
and shuffles through a buffer of bounded size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypedDict, TypeVar

from typing_extensions import Unpack

from megatron_parallel_r1.data.account import BadRow, RowAccount
from megatron_parallel_r1.data.cells import Cells, as_value, at_path
from megatron_parallel_r1.data.opening import open_hub, open_local
from megatron_parallel_r1.data.problems import Example, Problem
from megatron_parallel_r1.data.sampler import ShuffledEpochs
from megatron_parallel_r1.data.schemas import CUSTOM, Columns, Schema, schema_of
from megatron_parallel_r1.data.source import BadRows, RowSource, StreamedDataset, problem_of
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.formats import PARALLEL_R1, ThinkingFormat

T = TypeVar("T", Problem, Example)


@dataclass(frozen=True, slots=True)
class LoadedDataset(Generic[T]):
    """A data set in memory.

    Attributes:
        items: the items in the order of the rows; `Problem.id` is the row's number, after its file's name in
            a folder.
        account: the account of all rows.
    """

    items: tuple[T, ...]
    account: RowAccount

    def in_order(self) -> Iterator[T]:
        """Yields every item once."""
        return iter(self.items)

    def without(self, ids: Collection[str]) -> LoadedDataset[T]:
        """Returns the data set without the items of these ids; `account` still counts all rows."""
        return replace(self, items=tuple(item for item in self.items if problem_of(item).id not in ids))

    def shuffled(self, seed: int) -> ShuffledEpochs[T]:
        """Returns an endless order, for `ProblemStream`."""
        return ShuffledEpochs(self.items, seed)

    @property
    def rows(self) -> int:
        return self.account.rows

    @property
    def bad(self) -> tuple[BadRow, ...]:
        return self.account.bad

    @property
    def repeated(self) -> int:
        return self.account.repeated

    @property
    def disputed(self) -> int:
        return self.account.disputed


class ReadOptions(TypedDict, total=False):
    """How to read a data set; every key has a default.

    Attributes:
        columns: the columns of the user's own data set.
        split: the split, on the Hub or of a folder; None: the schema's default.
        config: the configuration, on the Hub or of a clone; None: the schema's.
        label: the source of the problems in metrics; None: as their rows or the schema say.
        fields: further columns that the prompt template shows.
        drop_repeats: whether to drop rows that repeat a problem, and all copies of one whose copies disagree;
            None: as the schema says. Kept ones are counted.
        limit: the maximum number of rows to read.
        bad_rows: stop at a bad row, or skip and count it.
        format: of the worked responses.
    """

    columns: Columns | None
    split: str | None
    config: str | None
    label: str | None
    fields: Sequence[str]
    drop_repeats: bool | None
    limit: int | None
    bad_rows: BadRows
    format: ThinkingFormat


def read_problems(
    name: str, path: Path | None = None, **options: Unpack[ReadOptions]
) -> LoadedDataset[Problem]:
    """Reads problems with their right answers.

    Args:
        name: the name on the Hub, which selects the schema; with `columns` any name, or `custom` for a data
            set that is not on the Hub.
        path: a local file or folder (`data/opening.py`), read instead of the Hub.

    Raises:
        UserError: the data set is unknown or cannot be loaded, a row is bad under `refuse`, or no row is
            usable.
    """
    return _read(_problems(name, path, options), options)


def read_examples(
    name: str, path: Path | None = None, **options: Unpack[ReadOptions]
) -> LoadedDataset[Example]:
    """Reads problems with a worked response, where the data set has them; otherwise like `read_problems`."""
    return _read(_examples(name, path, options), options)


def stream_problems(
    name: str, path: Path | None = None, *, buffer: int = 8192, **options: Unpack[ReadOptions]
) -> StreamedDataset[Problem]:
    """Like `read_problems`, for files larger than memory: holds at most `buffer` problems."""
    return _stream(_problems(name, path, options), options, buffer)


def stream_examples(
    name: str, path: Path | None = None, *, buffer: int = 8192, **options: Unpack[ReadOptions]
) -> StreamedDataset[Example]:
    """Like `read_examples`, for files larger than memory: holds at most `buffer` examples."""
    return _stream(_examples(name, path, options), options, buffer)


def _problems(name: str, path: Path | None, options: ReadOptions) -> RowSource[Problem]:
    schema = schema_of(name, options.get("columns"))
    return _open(schema, lambda row, id: _problem(schema, options, row, id), path, options)


def _examples(name: str, path: Path | None, options: ReadOptions) -> RowSource[Example]:
    schema = schema_of(name, options.get("columns"))
    response = schema.response
    if response is None:
        raise UserError(f"data set {name}: has no worked responses to fine-tune on")

    def example(row: Cells, id: str) -> Example:
        format = options.get("format", PARALLEL_R1)
        return Example(_problem(schema, options, row, id), response(row, format))

    return _open(schema, example, path, options)


def _problem(schema: Schema, options: ReadOptions, row: Cells, id: str) -> Problem:
    for name in options.get("fields", ()):
        at_path(name, as_value)(row)
    source = options.get("label") or (schema.source(row) if schema.source else schema.name)
    return Problem(id, schema.prompt(row), schema.answers(row), source, schema.context(row), row)


def _open(
    schema: Schema, build: Callable[[Cells, str], T], path: Path | None, options: ReadOptions
) -> RowSource[T]:
    for name in options.get("fields", ()):
        if name.partition(".")[0] in schema.secret:
            raise UserError(
                f"prompt_template: {{{name}}} would show the right answer of {schema.name}; leave it out, "
                f"or write {{{{{name}}}}} for the braces themselves"
            )
    split, config, drop = options.get("split"), options.get("config"), options.get("drop_repeats")
    repeats = schema.repeats if drop is None else drop
    if path is not None:
        label, tables = open_local(path, split, config, usual_split=schema.split, usual_config=schema.config)
        return RowSource(label, tables, build, repeats)
    if schema.name == CUSTOM:
        raise UserError("data set custom: give its path, or its name on the Hub instead of `custom`")
    table = open_hub(schema.name, config or schema.config, split or schema.split)
    return RowSource(schema.name, (table,), build, repeats)


def _read(source: RowSource[T], options: ReadOptions) -> LoadedDataset[T]:
    items: list[T] = []
    account, dropped = source.survey(
        options.get("bad_rows", "refuse"), options.get("limit"), lambda _, item: items.append(item)
    )
    return LoadedDataset(tuple(item for index, item in enumerate(items) if index not in dropped), account)


def _stream(source: RowSource[T], options: ReadOptions, buffer: int) -> StreamedDataset[T]:
    return StreamedDataset.survey(source, options.get("bad_rows", "refuse"), options.get("limit"), buffer)
