"""Benchmarks by name: from the Hub, from local copies, from a file of one's own, or generated in process.

A new one in a schema of `data/schemas.py` needs one line in `PUBLISHED`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.errors import UserError

if TYPE_CHECKING:
    from megatron_parallel_r1.data.embedded.congruence import Difficulty

EMBEDDED_PROBLEMS = 512


@dataclass(frozen=True, slots=True)
class HubBenchmark:
    """A data set on the Hub, and the split to evaluate on; None: the schema's default."""

    name: str
    split: str | None = None


PUBLISHED = {
    "aime24": HubBenchmark("HuggingFaceH4/aime_2024"),
    "aime25": HubBenchmark("math-ai/aime25"),
    "amc23": HubBenchmark("math-ai/amc23"),
    "math500": HubBenchmark("HuggingFaceH4/MATH-500"),
    "gsm8k": HubBenchmark("openai/gsm8k", "test"),
}
EMBEDDED: Mapping[str, Difficulty] = {"embedded_easy": "easy", "embedded_hard": "hard"}


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Problems, the name of the benchmark in tables, and the source of the problems."""

    name: str
    problems: tuple[Problem, ...]
    source: str


def read_benchmarks(
    names: Sequence[str],
    data: Path | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[Benchmark, ...]:
    """Reads benchmarks; a bad row is an error, because a score over fewer problems is another score.

    Args:
        names: each `aime24`, `aime24=FILE` for a copy of its own, or `NAME=FILE` for rows of the user's own.
        data: a folder of copies, named after the benchmark or the data set on the Hub: `aime24.parquet`.
            A missing copy is an error, not a download.
        limit: read only the first `limit` problems of each.
        columns: `prompt` and `answer` of the user's own rows; None or empty: found by their usual names.

    Raises:
        UserError: a name is unknown or given twice, or a file is missing or unusable.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: give 1 or more")
    benchmarks = tuple(_read(name, data, limit, columns or {}) for name in names)
    if not benchmarks:
        raise UserError(f"no benchmark given; name one or more of {', '.join((*PUBLISHED, *EMBEDDED))}")
    read = [benchmark.name for benchmark in benchmarks]
    if twice := next((name for name in read if read.count(name) > 1), None):
        raise UserError(f"benchmark {twice} is given twice; leave one out")
    return benchmarks


def _read(word: str, data: Path | None, limit: int | None, columns: Mapping[str, str]) -> Benchmark:
    # Imported here, so that `--help`, which lists the names, is fast.
    from megatron_parallel_r1.data.embedded.generate import evaluation_problems
    from megatron_parallel_r1.data.readers import read_problems

    name, own, file = word.partition("=")
    if name in EMBEDDED and not own:
        problems = evaluation_problems(EMBEDDED[name], limit or EMBEDDED_PROBLEMS)
        return Benchmark(name, problems, "generated in process")
    if name not in PUBLISHED:
        if not own or not name or name in EMBEDDED:
            known = ", ".join((*PUBLISHED, *EMBEDDED))
            raise UserError(
                f"benchmark {word!r}: unknown, use one of {known}, or NAME=FILE for rows of yours"
            )
        return _own(name, Path(file), limit, columns)
    published = PUBLISHED[name]
    path = Path(file) if own else _copy(name, published, data)
    # A file of one's own is the benchmark, whatever its name says.
    split = None if path is not None and path.is_file() else published.split
    reading = read_problems(published.name, path, split=split, limit=limit)
    return Benchmark(name, reading.items, str(path or f"{published.name} on the Hub"))


def _own(name: str, path: Path, limit: int | None, columns: Mapping[str, str]) -> Benchmark:
    """Reads rows of the user's own, of a folder its split `test`."""
    from megatron_parallel_r1.data.columns import find_columns
    from megatron_parallel_r1.data.readers import read_problems
    from megatron_parallel_r1.data.schemas import CUSTOM, Columns

    split = "test" if path.is_dir() else None
    found = Columns(**(columns or find_columns(path, examples=False, split=split)))
    reading = read_problems(CUSTOM, path, split=split, limit=limit, columns=found, label=name)
    return Benchmark(name, reading.items, str(path))


def _copy(name: str, published: HubBenchmark, data: Path | None) -> Path | None:
    if data is None:
        return None
    from megatron_parallel_r1.data.opening import OPENERS

    stems = (name, published.name.rpartition("/")[2])
    files = [data / f"{stem}{ending}" for stem in stems for ending in OPENERS]
    for file in files:
        if file.is_file():
            return file
    raise UserError(
        f"{data}: no copy of {name} ({stems[0]}.parquet, {stems[1]}.jsonl or the like); "
        f"add it, give {name}=FILE, or leave --data out to read {published.name} from the Hub"
    )
