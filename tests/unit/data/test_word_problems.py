"""The word problems of recipes/smollm2: right, well-formed, and held out by wording and by numbers."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import pytest

from megatron_parallel_r1.data.trace_text import WrittenTrace
from recipes.smollm2.word_problems import examples, problems, write_files


def numbers(question: str) -> tuple[str, ...]:
    return tuple(sorted(re.findall(r"\d+", question)))


def test_traces_are_well_formed_and_end_with_the_answer() -> None:
    shown = list(islice(examples(seed=3), 300))
    for row in shown:
        trace = WrittenTrace.of(row["response"])
        assert trace.main.endswith(f"Final Answer: {row['answer']}")
        for block in trace.tree.blocks:
            results = [trace.inside(path).rpartition("= ")[2] for path in block.paths]
            assert len(results) == 3 and results.count(row["answer"]) == max(map(results.count, results))
    with_block = sum("<Parallel>" in row["response"] for row in shown)
    assert 0.6 < with_block / len(shown) < 0.8
    slips = sum(f"= {row['answer']}</Path>" not in row["response"] for row in shown)
    assert slips < 0.35 * len(shown)


def test_held_out_problems_have_words_and_numbers_of_their_own(tmp_path: Path) -> None:
    write_files(tmp_path)
    files = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("cold_start", "train", "held_out")
    }
    assert [len(rows) for rows in files.values()] == [4000, 8000, 1024]
    held_out, trained = files["held_out"], files["cold_start"] + files["train"]

    def wordings(rows: list[dict[str, str]]) -> set[str]:
        # The verbs tell the templates apart; names and things are the same everywhere.
        return {re.sub(r"\d+|[A-Z]\w+|\b[a-z]+s\b", "_", row["problem"]) for row in rows}

    assert not wordings(held_out) & wordings(trained)
    assert not {numbers(row["problem"]) for row in held_out} & {numbers(row["problem"]) for row in trained}


@pytest.mark.parametrize("held_out", [False, True])
def test_a_seed_fixes_the_stream(held_out: bool) -> None:
    first, again = (list(islice(problems(5, held_out), 20)) for _ in range(2))
    assert first == again != list(islice(problems(6, held_out), 20))
