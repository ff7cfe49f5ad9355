"""Rows of a data set, from the Hugging Face Hub or from a local file, through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_ENDINGS = (".parquet", ".jsonl", ".json")
_CHUNK = 1000


def open_hub(name: str, config: str | None, split: str) -> Dataset:
    """A split of a data set on the Hub, or of its cached copy.

    Raises:
        UserError: it cannot be loaded.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many kinds, all of them the user's to mend
        raise UserError(
            f"data set {name}, split {split}: cannot load it from the Hugging Face Hub "
            f"({_first_line(error)}); check name and network, or give a local copy with path"
        ) from error


def open_file(path: Path) -> Dataset:
    """A parquet or JSON-lines file.

    Raises:
        UserError: there is no such file, or it is not what its ending says.
    """
    from datasets import Dataset

    if not path.is_file():
        raise UserError(f"{path}: no such data file")
    if path.suffix not in _ENDINGS:
        raise UserError(f"{path}: not one of {', '.join(_ENDINGS)}; convert it")
    # Not `load_dataset`, which pings a download counter first, and stalls where there is no network.
    build = Dataset.from_parquet if path.suffix == ".parquet" else Dataset.from_json
    try:
        with _no_progress_bars():
            return build(str(path.resolve()))
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"{path}: cannot be read as {path.suffix} ({_first_line(cause)})") from error


def rows(dataset: Dataset) -> Iterator[Mapping[str, Any] | UnicodeDecodeError]:
    """Every row in order; in place of one whose text is not UTF-8, the error."""
    for start in range(0, len(dataset), _CHUNK):
        try:
            yield from _chunk(dataset, start, start + _CHUNK)
        except UnicodeDecodeError:
            for index in range(start, min(start + _CHUNK, len(dataset))):
                yield _one(dataset, index)


def _chunk(dataset: Dataset, start: int, stop: int) -> list[dict[str, Any]]:
    columns = dataset[start:stop]
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _one(dataset: Dataset, index: int) -> Mapping[str, Any] | UnicodeDecodeError:
    try:
        return dataset[index]
    except UnicodeDecodeError as error:
        return error


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """A local file opens too soon for bars, which would disturb the run's own."""
    from datasets.utils.logging import (
        disable_progress_bar,
        enable_progress_bar,
        is_progress_bar_enabled,
    )

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()
