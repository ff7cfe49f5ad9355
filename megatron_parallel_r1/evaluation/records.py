"""Response records, one JSON line each: the cache of every evaluation and the source of every table.

A record's key is a hash of everything that decides the response (weights, decoding, engine, problem, sample,
seed), so that a repeated evaluation finds it and no other one does. A killed run leaves whole lines and
resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import decode, messages_of, template_columns
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.output import RECORDS, records_under, writing
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.metrics import judge_traces
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.utils.jsonl import JsonlWriter, read_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A response to draw: one sample of one problem.

    Attributes:
        identity: hash of the problem's text, right answers and context.
    """

    key: str
    benchmark: str
    problem: Problem
    identity: str
    sample: int
    seed: int


@dataclass(frozen=True, slots=True)
class ResponseRecord:
    """A verified response.

    Attributes:
        problem: its id within the benchmark.
        identity: of the problem, the same in every run.
        answer: the final answer as written, None for none.
        reason: which step of the verifier decided `correct`.
        finish: `eos`, or `length` where a limit cut it.
        tokens, critical_tokens: of the whole response, forced tags included, and of its longest chain (of a
            block only the longest path).
        first_block: relative position of the first block, 0 at the start and 1 at the end; None without one.
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


def sample_requests(
    benchmark: str,
    problems: Sequence[Problem],
    samples: int,
    seed: int,
    setup: Sequence[Any],
    template: str = "plain",
) -> list[SampleRequest]:
    """`samples` responses to each problem, problem by problem.

    The seed of a response depends only on `seed`, the problem and the sample: two checkpoints are compared on
    the same draws, and more samples or problems do not change the existing ones.

    Args:
        setup: plain JSON values that decide a response beside the problem: weights, decoding, engine.
        template: the prompt template, a name or a text.
    """
    requests = []
    shows_columns = bool(template_columns(template))
    for problem in problems:
        # Of a plain problem, the parts that decided its key before there were context and columns.
        context = [problem.context] if problem.context else []
        shown = [messages_of(template, problem)] if context or shows_columns else []
        identity = _hash(problem.prompt, list(problem.answers), *context)
        for sample in range(samples):
            drawn = int(_hash("seed", seed, problem.prompt, sample), 16) >> 1
            key = _hash(list(setup), problem.prompt, list(problem.answers), sample, drawn, *shown)
            requests.append(SampleRequest(key, benchmark, problem, identity, sample, drawn))
    return requests


def response_record(
    request: SampleRequest, trace: Trace, tokenizer: PreTrainedTokenizerBase, verifier: Verifier
) -> ResponseRecord:
    """Verifies a response and records it."""
    (judged,) = judge_traces([trace], [request.problem], tokenizer, verifier)
    first = trace.tree.blocks[0].start if trace.tree.blocks else None
    return ResponseRecord(
        key=request.key,
        benchmark=request.benchmark,
        problem=request.problem.id,
        identity=request.identity,
        sample=request.sample,
        seed=request.seed,
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
        response=decode(tokenizer, trace.tokens),
    )


class RecordFolder:
    """The records of one setup (weights, decoding, engine): `records/<setup>/*.jsonl`, a file per model copy.

    Args:
        folder: of all evaluations.
        setup: as in `sample_requests`; written to `setup.json` beside the records.
    """

    def __init__(self, folder: Path, setup: Sequence[Any]) -> None:
        self.folder = records_under(folder) / _hash(list(setup))[:12]
        self._setup = setup

    def read(self) -> dict[str, ResponseRecord]:
        """All records by key; the last of two with one key.

        Raises:
            UserError: a line other than a torn last one is not a record.
        """
        records: dict[str, ResponseRecord] = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for number, values in enumerate(read_jsonl(file), 1):
                if values.keys() != {field.name for field in fields(ResponseRecord)}:
                    raise UserError(f"{file}, record {number}: not a record of this version; delete the file")
                record = ResponseRecord(**{**values, "references": tuple(values["references"])})
                records[record.key] = record
        return records

    @contextmanager
    def writer(self, copy: int) -> Iterator[Callable[[ResponseRecord], None]]:
        """Yields a function that appends a record of one copy of the model at once.

        Raises:
            UserError: the folder, or later a record, cannot be written.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if copy == 0:
                (self.folder / "setup.json").write_text(
                    json.dumps(self._setup, indent=2, ensure_ascii=False) + "\n"
                )
            path = self.folder / RECORDS.replace("*", str(copy))
            lines = JsonlWriter(path)

        def write(record: ResponseRecord) -> None:
            with writing(path):
                lines.write(asdict(record))

        with lines:
            yield write


def _hash(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).digest().hex()
