"""Opens a file, a folder with splits, what `save_to_disk` wrote, a clone of the Hub, or the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from megatron_parallel_r1.data.cells import RowTable
from megatron_parallel_r1.data.tables import ArrowTable, ParquetTable
from megatron_parallel_r1.data.text_tables import COMPRESSED, CsvTable, first_line, open_json
from megatron_parallel_r1.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")

_TEXT: dict[str, Callable[[Path], RowTable]] = {
    ".jsonl": open_json,
    ".json": open_json,
    ".csv": CsvTable,
    ".tsv": CsvTable,
}
OPENERS: dict[str, Callable[[Path], RowTable]] = {
    ".parquet": ParquetTable,
    **_TEXT,
    ".arrow": lambda path: _open_arrow(path),
    **{text + end: opener for text, opener in _TEXT.items() for end in COMPRESSED},
}
_NOT_ROWS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_LFS_POINTER = b"version https://git-lfs"
_CARD_WITH_CONFIGS = re.compile(r"\A---\n(?:(?!---\n).*\n)*?configs:")


def open_hub(name: str, config: str | None, split: str) -> ArrowTable:
    """Opens a split of a data set on the Hub, or its cached copy.

    Raises:
        UserError: the split cannot be loaded.
    """
    from datasets import load_dataset

    try:
        return ArrowTable(load_dataset(name, config, split=split), name)
    except Exception as error:  # the library raises many types, all of them for the user to fix
        raise UserError(
            f"data set {name}, split {split}: cannot load it from the Hugging Face Hub "
            f"({first_line(error)}); check name and network, or give a local copy with path"
        ) from error


def open_local(
    path: Path, split: str | None, config: str | None = None, *, usual_split: str, usual_config: str | None
) -> tuple[str, tuple[RowTable, ...]]:
    """Opens a file, or the split of a folder, and returns it with its label for messages.

    Splits are recognized as by `datasets`: by the words train, validation and test in the names of files or
    folders, or by `configs` in the README of a clone of the Hub. A folder whose names say no split is read
    whole, sorted by name.

    Args:
        split: None: all of a file, of a folder `usual_split`.
        config: the configuration of a clone; None: `usual_config` if the clone has it.

    Raises:
        UserError: there is no such file, configuration or split, or a file cannot be read.
    """
    saved = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    saved = saved or (path / "dataset_dict.json").is_file()
    if config is not None and (saved or path.is_file()):
        raise UserError(f"{path}: no config {config!r}; only a clone of the Hub has any: leave config out")
    if path.is_file():
        names = _splits_in_name(path.name) if split is not None else ()
        _choose(path, names, split, split or usual_split)
        return str(path), (open_file(path),)
    if not path.is_dir():
        raise UserError(f"{path}: no such data file")
    if saved:
        return _open_saved(path, split, usual_split)
    base, splits = _files_by_split(path, config, usual_config)
    name = _choose(path, splits, split, usual_split)
    files = splits[name] if name is not None else _all_files(base)
    if not files:
        raise UserError(f"{path}: holds no {', '.join(OPENERS)} file")
    tables = tuple(map(open_file, files))
    for table, file in zip(tables, files, strict=True):
        table.name = file.relative_to(base).as_posix() if file.is_relative_to(base) else file.name
    return str(path) if name is None else f"{path}, split {name}", tables


def _choose(path: Path, splits: Collection[str], split: str | None, usual: str) -> str | None:
    """Returns the split to read; None for data that has none, which is all for training."""
    if not splits and split in (None, "train"):
        return None
    if (wanted := split or usual) in splits:
        return wanted
    if not splits:
        raise UserError(f"{path}: no split {split!r}; no name there says a split: leave split out")
    raise UserError(f"{path}: no split {wanted!r}; set split to {' or '.join(sorted(splits))}")


def _splits_in_name(name: str) -> list[str]:
    from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

    words = set(re.split(f"[{NON_WORDS_CHARS}]+", name))
    return [str(split) for split, keywords in SPLIT_KEYWORDS.items() if words.intersection(keywords)]


def _files_by_split(
    path: Path, config: str | None, usual: str | None
) -> tuple[Path, Mapping[str, list[Path]]]:
    """Returns the folder to which names of files are relative, and its data files by split."""
    from datasets import get_dataset_config_names, load_dataset_builder
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    wanted = config or usual
    card = path / "README.md"
    try:
        if card.is_file() and _CARD_WITH_CONFIGS.match(card.read_text(encoding="utf-8", errors="replace")):
            configs = get_dataset_config_names(str(path))
            if wanted not in configs and (config is not None or len(configs) > 1):
                raise UserError(f"{path}: no config {wanted!r}; set config to {' or '.join(configs)}")
            chosen = wanted if wanted in configs else None
            found = load_dataset_builder(str(path), chosen).config.data_files or {}
        else:
            if wanted is not None and (path / wanted).is_dir():
                path = path / wanted
            elif config is not None:
                raise UserError(f"{path}: no config {config!r}; neither a folder nor its README says one")
            patterns = get_data_patterns(path.resolve().as_posix())
            if list(patterns.values()) == [["**"]]:
                return path, {}
            found = DataFilesDict.from_patterns(patterns, base_path=path.resolve().as_posix())
    except EmptyDatasetError:
        return path, {}
    except UserError:
        raise
    except Exception as error:  # the library raises many types, all of them for the user to fix
        raise UserError(f"{path}: cannot be read by datasets ({first_line(error)}); copy it again") from None
    base = path.resolve()
    by_split = {
        str(split): sorted(file for name in files if _is_rows(file := Path(name)))
        for split, files in found.items()
    }
    return base, {split: files for split, files in by_split.items() if files}


def _all_files(folder: Path) -> list[Path]:
    """Returns the data files of a folder, or of all folders inside if it has none itself."""
    here = sorted(file for file in folder.iterdir() if _is_rows(file))
    return here or sorted(file for file in folder.rglob("*") if _is_rows(file))


def _is_rows(file: Path) -> bool:
    return file.is_file() and file.name not in _NOT_ROWS and file.name.endswith(tuple(OPENERS))


def open_file(path: Path) -> RowTable:
    """Opens a file of rows.

    Raises:
        UserError: its suffix is unknown, or its content does not match the suffix.
    """
    ending = max((ending for ending in OPENERS if path.name.endswith(ending)), key=len, default=None)
    if ending is None:
        raise UserError(f"{path}: not one of {', '.join(OPENERS)}; convert it")
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again") from None
    if is_pointer:
        raise UserError(f"{path}: a Git LFS pointer, not the data; run `git lfs pull` in its folder")
    return OPENERS[ending](path)


def _open_arrow(path: Path) -> RowTable:
    from datasets import Dataset

    table = _loaded(path, lambda: ArrowTable(Dataset.from_file(str(path)), str(path)))
    table.name = path.name
    return table


def _open_saved(path: Path, split: str | None, usual_split: str) -> tuple[str, tuple[RowTable, ...]]:
    """Opens what `save_to_disk` wrote: one table, or a table for each split."""
    from datasets import DatasetDict, load_from_disk

    saved: Dataset | DatasetDict = _loaded(path, lambda: load_from_disk(str(path)))
    if isinstance(saved, DatasetDict):
        name = _choose(path, saved, split, usual_split)
        label = f"{path}, split {name}"
        return label, (ArrowTable(saved[name], label),)
    recorded = re.sub(r"\[[^]]*\]", "", str(saved.split or ""))  # of `train[:10%]` the name
    _choose(path, (recorded,) if recorded else (), split, usual_split)
    return str(path), (ArrowTable(saved, str(path)),)


def _loaded(path: Path, load: Callable[[], T]) -> T:
    try:
        return load()
    except Exception as error:  # the library raises many types, all of them for the user to fix
        raise UserError(f"{path}: cannot be read by datasets ({first_line(error)}); copy it again") from None
