"""Every answer as it came, one line each: what a killed cold start goes on from."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_parallel_r1.coldstart.teacher import Answer, Request
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.jsonl import JsonlWriter, read_jsonl


class Journal:
    """Answers by the key of their request. Those to requests that are asked no more stay, and do no harm."""

    def __init__(self, path: Path, lines: JsonlWriter) -> None:
        self._lines = lines
        self._answers: dict[str, Answer] = {}
        for record in read_jsonl(path):
            try:
                self._answers[record["key"]] = Answer(record["text"], record["finish"])
            except KeyError as error:
                raise UserError(
                    f"{path}: a record without {error}, so no journal of answers; choose another out"
                ) from None

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def keep(self, key: str, request: Request, answer: Answer) -> None:
        """Writes an answer down, at once.

        Raises:
            UserError: the disk has no room for it.
        """
        try:
            self._lines.write(
                {
                    "key": key,
                    "problem": request.problem.id,
                    "sample": request.sample,
                    "finish": answer.finish,
                    "text": answer.text,
                }
            )
        except OSError as error:
            raise UserError(f"the journal cannot be written ({error}); make room and start again") from None
        self._answers[key] = answer


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """The journal of a folder, for this process alone.

    Raises:
        UserError: another process has it open, it is none, or its folder cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{path.parent}: {error.strerror or error}; choose another out") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path.parent}: another cold start is writing here; let it end, or choose another out"
            ) from None
        with JsonlWriter(path) as lines:
            yield Journal(path, lines)
    finally:
        os.close(lock)
