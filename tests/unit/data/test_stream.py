"""The streamed shuffle: a permutation an epoch, bounded memory, one integer to resume from."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.data.readers import read_problems, stream_examples, stream_problems
from megatron_parallel_r1.data.sampler import ProblemStream, RowLocation, StreamedShuffle
from megatron_parallel_r1.data.schemas import Columns
from megatron_parallel_r1.errors import UserError

AIME = "math-ai/aime25"
DAPO = "BytedTsinghua-SIA/DAPO-Math-17k"


def shuffle(
    rows: list[list[int]], buffer: int, seed: int, loads: list[int] | None = None
) -> StreamedShuffle[RowLocation]:
    def load(places: Sequence[RowLocation]) -> list[RowLocation]:
        assert list(places) == sorted(places), "files are read forwards"
        if loads is not None:
            loads.append(len(places))
        return list(places)

    return StreamedShuffle([np.array(numbers, np.int64) for numbers in rows], load, buffer, seed)


tables = st.lists(
    st.lists(st.integers(0, 99), unique=True, max_size=30).map(sorted), min_size=1, max_size=4
).filter(any)


@given(tables, st.integers(1, 80), st.integers(), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_resumed_anywhere_it_goes_on_as_if_never_stopped(
    rows: list[list[int]], buffer: int, seed: int, batches: list[int]
) -> None:
    whole = ProblemStream(shuffle(rows, buffer, seed), 0).next_batch(sum(batches))
    drawn: tuple[RowLocation, ...] = ()
    state = {"position": 0}
    for batch in batches:
        stream = ProblemStream(shuffle(rows, buffer, seed), 0)
        stream.restore(json.loads(json.dumps(state)))
        drawn += stream.next_batch(batch)
        state = stream.state()
    assert drawn == whole


@given(tables, st.integers(1, 80), st.integers())
def test_each_epoch_holds_every_row_once_and_no_more_than_the_buffer_at_a_time(
    rows: list[list[int]], buffer: int, seed: int
) -> None:
    every = [(shard, row) for shard, numbers in enumerate(rows) for row in numbers]
    loads: list[int] = []
    at = shuffle(rows, buffer, seed, loads)
    assert len(at) == len(every)
    for epoch in range(2):
        assert sorted(at(epoch * len(every) + place) for place in range(len(every))) == every
    assert max(loads) <= buffer
    assert sum(loads) == 2 * len(every), "each row is read once an epoch"


@pytest.mark.parametrize("buffer", [64, 1000])
def test_seeds_and_epochs_have_their_own_order(buffer: int) -> None:
    def epoch(seed: int, number: int) -> list[RowLocation]:
        at = shuffle([list(range(200))], buffer, seed)
        return [at(number * 200 + place) for place in range(200)]

    orders = [epoch(0, 0), epoch(0, 1), epoch(1, 0)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert epoch(0, 0) == orders[0]


def test_a_buffer_holds_rows_from_all_over_the_file() -> None:
    at = shuffle([list(range(10_000))], 320, seed=0)
    first = [at(place)[1] for place in range(320)]
    # 16 chunks of 20 neighbours; a shuffle of one place alone would span 320.
    assert len({row // 20 for row in first}) == 16
    assert max(first) - min(first) > 5000
    assert sum(abs(a - b) == 1 for a, b in pairwise(first)) < 16


def test_nothing_to_shuffle() -> None:
    for rows, buffer in (([[], []], 4), ([[1]], 0)):
        with pytest.raises(ValueError, match="both must be positive"):
            shuffle(rows, buffer, 0)


def folder_of_shards(folder: Path, rows: int) -> Path:
    """Two JSON Lines files and a parquet file of several row groups, with bad rows and blank lines."""
    folder.mkdir()
    cells = [{"problem": f"p{i}" if i % 7 != 3 else None, "answer": i} for i in range(rows)]
    for name in ("a", "c"):
        lines = [json.dumps(row) + ("\n\n" if i % 5 == 0 else "\n") for i, row in enumerate(cells)]
        mark = "\ufeff" if name == "a" else ""
        (folder / f"{name}.jsonl").write_text(mark + "".join(lines))
    table = pa.Table.from_pylist(cells, schema=pa.schema({"problem": pa.string(), "answer": pa.int64()}))
    pq.write_table(table, folder / "b.parquet", row_group_size=1100)
    return folder


def test_streamed_files_give_what_reading_them_gives(tmp_path: Path) -> None:
    path = folder_of_shards(tmp_path / "shards", rows=2600)
    reading = read_problems(AIME, path, bad_rows="skip")
    streamed = stream_problems(AIME, path, bad_rows="skip", buffer=500)
    assert streamed.account == reading.account
    assert tuple(streamed.in_order()) == reading.items
    at = streamed.shuffled(seed=3)
    epoch = [at(place) for place in range(len(streamed))]
    assert len(epoch) == len(reading.items) and set(epoch) == set(reading.items)
    resumed = streamed.shuffled(seed=3)
    for place in (len(epoch) - 1, 0, 777):
        assert resumed(place) == epoch[place]


def test_ids_can_be_taken_out(tmp_path: Path) -> None:
    path = folder_of_shards(tmp_path / "shards", rows=20)
    streamed = stream_problems(AIME, path, bad_rows="skip", limit=45)
    ids = [problem.id for problem in streamed.in_order()]
    some = set(random.Random(0).sample(ids, 10))
    for whole in (streamed, read_problems(AIME, path, bad_rows="skip", limit=45)):
        left = whole.without(some)
        assert [problem.id for problem in left.in_order()] == [id for id in ids if id not in some]
        assert left.account == whole.account
        at = left.shuffled(seed=1)
        assert {at(place).id for place in range(len(ids) - 10)} == {*ids} - some


def test_repeats_are_gone_in_a_stream_too(real_data: Path) -> None:
    path = real_data / "dapo_math_17k.parquet"
    streamed = stream_problems(DAPO, path)
    assert tuple(streamed.in_order()) == read_problems(DAPO, path).items


def test_disputed_problems_go_from_whatever_file_has_them(tmp_path: Path) -> None:
    files = {"a": ["p0", "p1", "p2"], "b": ["p3", "p1", "p4", "p5", "p4"]}
    for name, prompts in files.items():
        rows = [
            {"prompt": [{"content": prompt}], "reward_model": {"ground_truth": f"{name}{i}"}}
            for i, prompt in enumerate(prompts)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    streamed = stream_problems(DAPO, tmp_path)
    assert [problem.prompt for problem in streamed.in_order()] == ["p0", "p2", "p3", "p5"]
    assert (streamed.account.kept, streamed.account.disputed) == (4, 4)


def test_examples_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": f"q{i}", "a": i, "r": f"r{i}"}) + "\n" for i in range(5)))
    streamed = stream_examples("custom", path, columns=Columns(prompt="q", answer="a", response="r"))
    assert [example.response for example in streamed.in_order()] == [f"r{i}" for i in range(5)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_that_changes_under_the_stream_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"

    def write(*prompts: str | None) -> None:
        table = pa.table({"problem": pa.array(prompts, pa.string()), "answer": ["1"] * len(prompts)})
        if suffix == ".parquet":
            pq.write_table(table, path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))

    write("a", "b", "c")
    streamed = stream_problems(AIME, path)
    for now in (["a", None, "c"], ["a"]):
        write(*now)
        with pytest.raises(
            UserError, match=rf"rows\{suffix}: changed while it was in use \(.*\); restore it"
        ):
            list(streamed.in_order())
    write("a", "b", "c")
    assert [problem.prompt for problem in streamed.in_order()] == ["a", "b", "c"]
