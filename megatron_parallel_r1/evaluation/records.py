"""What was drawn, one JSON line a response: the cache of every evaluation and the ground of every table.

A record's key is a hash of all that decides it (weights, decoding, engine, question, sample, seed), so it is
found by whoever asks for the same again, and by nobody else. A killed run leaves whole lines and goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.utils.jsonl import JsonlWriter, read_jsonl


@dataclass(frozen=True, slots=True)
class Attempt:
    """A response to draw: one sample of one problem.

    Attributes:
        identity: of the problem, by content: question and right answers.
    """

    key: str
    benchmark: str
    problem: Problem
    identity: str
    sample: int
    seed: int


@dataclass(frozen=True, slots=True)
class Record:
    """A judged response.

    Attributes:
        problem: its id within the benchmark.
        identity: of the problem, the same in every run that asked it.
        answer: the final answer as written, None for none.
        reason: which step of the verifier decided `correct`.
        finish: `eos`, or `length` where a limit cut it.
        tokens, critical_tokens: of the whole response, forced tags included, and of its longest chain (of a
            block only the longest path).
        first_block: place of the first block, 0 at the response's begin and 1 at its end; None without one.
        first_block_token: its index.
        response: the text, tags included.
    """

    key: str
    benchmark: str
    problem: str
    identity: str
    sample: int
    seed: int
    answer: str | None
    references: tuple[str, ...]
    correct: bool
    reason: str
    finish: str
    tokens: int
    critical_tokens: int
    blocks: int
    well_formed_blocks: int
    paths: int
    first_block: float | None
    first_block_token: int | None
    response: str


def attempts(
    benchmark: str, problems: Sequence[Problem], samples: int, seed: int, setup: Sequence[Any]
) -> list[Attempt]:
    """`samples` responses to each problem, problem by problem.

    A response's seed follows from `seed`, question and sample alone: two checkpoints are compared on the same
    draws, and more samples or problems leave those that are there as they are.

    Args:
        setup: plain JSON values that decide a response beside the question: weights, decoding, engine.
    """
    found = []
    for problem in problems:
        identity = _hash(problem.prompt, list(problem.answers))
        for sample in range(samples):
            drawn = int(_hash("seed", seed, problem.prompt, sample), 16) >> 1
            key = _hash(list(setup), problem.prompt, list(problem.answers), sample, drawn)
            found.append(Attempt(key, benchmark, problem, identity, sample, drawn))
    return found


def record_of(attempt: Attempt, trace: Trace, judged: Judged, response: str) -> Record:
    """What is kept of a response."""
    first = trace.tree.blocks[0].start if trace.tree.blocks else None
    return Record(
        key=attempt.key,
        benchmark=attempt.benchmark,
        problem=attempt.problem.id,
        identity=attempt.identity,
        sample=attempt.sample,
        seed=attempt.seed,
        answer=judged.extracted,
        references=judged.references,
        correct=judged.correct,
        reason=judged.reason,
        finish=trace.finish,
        tokens=judged.length,
        critical_tokens=judged.critical_length,
        blocks=judged.format.blocks,
        well_formed_blocks=judged.format.well_formed_blocks,
        paths=judged.format.paths,
        first_block=None if first is None else first / len(trace.tokens),
        first_block_token=first,
        response=response,
    )


class RecordFolder:
    """The records of one setup (weights, decoding, engine): `records/<setup>/*.jsonl`, a file a writer.

    Args:
        folder: of all evaluations.
        setup: as given to `attempts`; kept beside the records for whoever reads them.
    """

    def __init__(self, folder: Path, setup: Sequence[Any]) -> None:
        self.folder = records_under(folder) / _hash(list(setup))[:12]
        self._setup = setup

    def read(self) -> dict[str, Record]:
        """All records by key; of two with one key the last read.

        Raises:
            UserError: a line other than a torn last one is no record.
        """
        found: dict[str, Record] = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for line, told in enumerate(read_jsonl(file), 1):
                record = _read(told)
                if record is None:
                    raise UserError(f"{file}, record {line}: not a record of this version; delete the file")
                found[record.key] = record
        return found

    def writer(self, copy: int) -> RecordWriter:
        """Appends what this copy of the model draws.

        Raises:
            UserError: here, and at each record: it cannot be written.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if copy == 0:
                (self.folder / "setup.json").write_text(
                    json.dumps(self._setup, indent=2, ensure_ascii=False) + "\n"
                )
            return RecordWriter(self.folder / RECORDS.replace("*", str(copy)))


class RecordWriter:
    """Keeps each record as soon as it is there; use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = JsonlWriter(path)

    def write(self, record: Record) -> None:
        with writing(self._path):
            self._lines.write(asdict(record))

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.close()


def _read(told: dict[str, Any]) -> Record | None:
    if told.keys() != {field.name for field in fields(Record)}:
        return None
    return Record(**{**told, "references": tuple(told["references"])})


def _hash(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).digest().hex()


USUAL = Path("runs/eval")
RECORDS = "copy*.jsonl"


def records_under(out: Path) -> Path:
    """The folder of all records."""
    return out / "records"


def check_out(folder: Path) -> None:
    """Whether `folder` can be written, or made: known before a model is loaded, and nothing is made yet.

    Raises:
        UserError: it cannot.
    """
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"--out {folder}: {there} is no folder; give another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder}: {there} may not be written; give another")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around what writes there.

    Raises:
        UserError: it cannot be written, or the disk is full.
    """
    try:
        yield
    except OSError as error:
        where, why = error.filename or folder, error.strerror or error
        raise UserError(f"{where}: {why}; mend that and start again, or give another --out") from None
