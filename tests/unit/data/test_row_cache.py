"""Cached rows: the same as made ones, made again where anything changed or broke, under several processes."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_parallel_r1.data.embedded.generate import build_tokenizer, cold_start_example
from megatron_parallel_r1.data.embedded.traces import TraceStyle
from megatron_parallel_r1.data.problems import Example
from megatron_parallel_r1.data.prompts import encode_prompt, encode_response
from megatron_parallel_r1.data.row_cache import RowCache, tokenizer_hash
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.layout import Mode, Row, lay_out
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tokenizer import add_tags

TOKENIZER = build_tokenizer()
TAGS = add_tags(TOKENIZER)
EXAMPLES = [cold_start_example(TraceStyle(sequential=0.3), 0.3, 7, index) for index in range(1200)]
FIELDS = ("tokens_L", "positions_L", "hide_lo_DL", "hide_hi_DL", "source_L")


def row_of(example: Example, mode: Mode) -> Row:
    tokens = encode_response(TOKENIZER, example.response)
    tree = parse(tokens, TAGS, strict=True)
    prompt = encode_prompt(TOKENIZER, "plain", example.problem.prompt)
    return lay_out(prompt, tokens, [True] * len(tokens), tree, mode)


class Counting:
    """Makes rows and counts them; its own code is this file, as for any function here."""

    def __init__(self, mode: Mode = "isolated") -> None:
        self.count = 0
        self.mode = mode

    def row(self, example: Example) -> Row:
        self.count += 1
        return row_of(example, self.mode)


def assert_same(rows: list[Row], others: list[Row]) -> None:
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        for field in FIELDS:
            one, two = getattr(row, field), getattr(other, field)
            assert one.dtype == two.dtype == np.int32
            assert one.shape == two.shape
            assert (one == two).all()


@pytest.fixture
def cache(tmp_path: Path) -> RowCache:
    return RowCache(tmp_path / "cache", "a tokenizer", "plain", "isolated")


@pytest.mark.parametrize("mode", ["isolated", "replay", "causal"])
def test_rows_from_disk_are_the_rows_that_were_made(mode: Mode, cache: RowCache) -> None:
    cache = replace(cache, mode=mode)
    expected = [row_of(example, mode) for example in EXAMPLES]
    first, again = Counting(mode), Counting(mode)
    assert_same(cache.rows(EXAMPLES, first.row), expected)
    assert_same(cache.rows(EXAMPLES, again.row), expected)
    assert (first.count, again.count) == (1200, 0)
    assert all(file.suffix == ".rows" for file in cache.folder.iterdir()), "nothing half-written is left"


def test_whatever_a_row_follows_from_makes_it_anew(cache: RowCache) -> None:
    example = EXAMPLES[0]
    cache.rows([example], Counting().row)
    problem = example.problem
    for other, examples in (
        (replace(cache, tokenizer="another"), [example]),
        (replace(cache, template="parallel"), [example]),
        (replace(cache, mode="replay"), [example]),
        (cache, [replace(example, response=example.response + " ")]),
        (cache, [replace(example, problem=replace(problem, prompt=problem.prompt + " "))]),
        (cache, [example, example]),
    ):
        counting = Counting()
        other.rows(examples, counting.row)
        assert counting.count == len(examples)
    untouched = Counting()
    cache.rows([replace(example, problem=replace(problem, id="x", source="y"))], untouched.row)
    assert untouched.count == 0, "a row does not follow from the name of its problem"


def test_other_code_makes_rows_anew(cache: RowCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    versions = []
    for version in (1, 2):
        (tmp_path / f"maker{version}.py").write_text(
            f"from tests.unit.data.test_row_cache import row_of\n\n\ndef make(example, versions):\n"
            f"    versions.append({version})\n    return row_of(example, 'isolated')\n"
        )
        module = __import__(f"maker{version}")
        for _ in range(2):
            cache.rows(EXAMPLES[:1], partial(module.make, versions=versions))
    assert versions == [1, 2]


def test_a_damaged_file_is_made_again(cache: RowCache) -> None:
    examples = EXAMPLES[:20]
    expected = cache.rows(examples, Counting().row)
    (file,) = cache.folder.iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (b"", whole[:10], whole[:-4], flipped, whole + b"\0\0\0\0", bytes(len(whole))):
        file.write_bytes(damaged)
        counting = Counting()
        assert_same(cache.rows(examples, counting.row), expected)
        assert counting.count == 20
        assert file.read_bytes() == whole


def _fill(cache: RowCache, barrier: object, tell: object) -> None:
    counting = Counting()
    barrier.wait()
    for _ in range(5):
        for file in cache.folder.glob("*.rows"):
            file.unlink(missing_ok=True)
        rows = cache.rows(EXAMPLES[:600], counting.row)
    tell.put(sum(int(row.tokens_L.sum()) for row in rows))


def test_several_processes_share_a_folder(cache: RowCache) -> None:
    context = multiprocessing.get_context("fork")
    barrier, tell = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_fill, args=(cache, barrier, tell)) for _ in range(3)]
    for worker in workers:
        worker.start()
    sums = {tell.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sums == {sum(int(row_of(example, "isolated").tokens_L.sum()) for example in EXAMPLES[:600])}
    after = Counting()
    cache.rows(EXAMPLES[:600], after.row)
    assert after.count == 0, "whoever deletes a file writes it before it ends"
    assert [file.suffix for file in cache.folder.iterdir()] == [".rows"] * len(list(cache.folder.iterdir()))


def test_a_file_is_there_whole_or_not_at_all(cache: RowCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", stopped)
    with pytest.raises(UserError, match="No space left on device"):
        cache.rows(EXAMPLES[:1], Counting().row)
    assert not list(cache.folder.iterdir())


def test_a_folder_that_cannot_be_written(cache: RowCache) -> None:
    cache.folder.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot cache rows there .*set another cache folder"):
        cache.rows(EXAMPLES[:1], Counting().row)


def test_a_tokenizer_is_known_by_its_files_not_by_its_place(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    hashes = []
    for folder in ("here", "there"):
        TOKENIZER.save_pretrained(tmp_path / folder)
        hashes.append(tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path / folder)))
    assert hashes[0] == hashes[1]
    other = AutoTokenizer.from_pretrained(tmp_path / "here")
    other.chat_template = "{{ messages[0].content }}"
    assert tokenizer_hash(other) != hashes[0]
    other = AutoTokenizer.from_pretrained(tmp_path / "here")
    other.add_tokens(["<new>"])
    assert tokenizer_hash(other) != hashes[0]
