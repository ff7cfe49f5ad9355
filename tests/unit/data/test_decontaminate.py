"""Overlaps between training and evaluation problems, against the definition and on the real sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.data.decontaminate import (
    contamination_table,
    find_contamination,
    normalized,
    words_of,
)
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.readers import read_problems

EVALUATION = {
    "HuggingFaceH4/MATH-500": "math300",
    "HuggingFaceH4/aime_2024": "aime24",
    "math-ai/aime25": "aime25",
    "math-ai/amc23": "amc23",
}


def problems(source: str, *prompts: str) -> list[Problem]:
    return [Problem(str(index), prompt, ("1",), source) for index, prompt in enumerate(prompts)]


LONG = "Ann has three red apples and Bob has four green ones, how many apples do they have together?"


def test_a_run_of_thirteen_words_is_found_whatever_stands_around_it() -> None:
    inside = f"Yesterday: {LONG.upper().replace(',', ' --')} Give a number."
    twelve = " ".join(LONG.split()[:12])
    found = find_contamination(problems("train", "other", inside, twelve), problems("eval", LONG))
    (overlap,) = found.overlaps
    assert (overlap.training.id, overlap.evaluation.prompt, overlap.same) == ("1", LONG, False)
    assert overlap.share == 1.0
    assert overlap.shared == " ".join(words_of(LONG))
    assert found.rows() == {"1"}
    assert (found.training_count, found.evaluation_count) == (3, 1)


def test_the_longest_stretch_in_common_is_shown() -> None:
    evaluated = " ".join(f"w{i}" for i in range(40))
    trained = " ".join([*(f"w{i}" for i in range(14)), "x", *(f"w{i}" for i in range(20, 36)), "y"])
    (overlap,) = find_contamination(problems("train", trained), problems("eval", evaluated)).overlaps
    assert overlap.shared == " ".join(f"w{i}" for i in range(20, 36))
    assert overlap.share == (2 + 4) / 28
    assert not find_contamination(problems("t", trained), problems("e", evaluated), min_overlap=0.5).overlaps


def test_short_problems_are_found_as_the_same_text_only() -> None:
    evaluated = problems("eval", r"Compute $\left( 2-3 \right) x$.")
    trained = problems("train", r"compute \((2 - 3)x\)", "Compute $(2+3)x$.", "Compute $(2-3)x$ and add 1.")
    (overlap,) = find_contamination(trained, evaluated).overlaps
    assert (overlap.training.id, overlap.same, overlap.share) == ("0", True, 1.0)
    assert overlap.shared == evaluated[0].prompt


def test_runs_that_many_training_problems_hold_are_passed_over() -> None:
    trained = problems("train", *[f"{LONG} {i}" for i in range(11)], LONG)
    found = find_contamination(trained, problems("eval", LONG))
    assert found.rows() == {"11"}, "the same text counts, however common its words"
    words = words_of(LONG)
    runs = sorted(" ".join(words[start : start + 13]) for start in range(len(words) - 12))
    assert found.stock_phrases == tuple((run, 12) for run in runs)
    assert len(find_contamination(trained, problems("eval", LONG), max_problems_per_ngram=12).rows()) == 12


def test_several_answers_to_a_problem_do_not_make_it_common() -> None:
    copies = [f"As seen: {LONG} Say a number.", f"as seen: {LONG}  Say a number"] * 10
    trained = problems("train", *copies, "other", f"{LONG} Explain.")
    found = find_contamination(trained, problems("eval", LONG))
    assert found.rows() == {str(row) for row in (*range(20), 21)} and not found.stock_phrases
    assert (found.training_count, {overlap.share for overlap in found.overlaps}) == (22, {1.0})
    counted = find_contamination(trained, problems("eval", LONG), max_problems_per_ngram=1).stock_phrases
    assert {count for _, count in counted} == {2}


def test_what_cannot_be_a_run() -> None:
    for words, common in ((0, 1), (13, 0)):
        with pytest.raises(ValueError, match="must be positive"):
            find_contamination([], [], words, common)


texts = st.lists(st.sampled_from(["a", "b", "c", "+", "-"]), min_size=1, max_size=9).map(" ".join)


@given(st.lists(texts, max_size=6), st.lists(texts, max_size=4), st.integers(1, 4), st.integers(1, 3))
def test_the_definition(trained: list[str], evaluated: list[str], words: int, common: int) -> None:
    def holds(text: str, run: list[str]) -> bool:
        inside = words_of(text)
        return any(inside[start : start + len(run)] == run for start in range(len(inside) - len(run) + 1))

    def telling(text: str) -> list[list[str]]:
        inside = words_of(text)
        runs = [inside[start : start + words] for start in range(len(inside) - words + 1)]
        different = {normalized(other): other for other in trained}.values()
        return [run for run in runs if sum(holds(other, run) for other in different) <= common]

    expected = {
        (str(i), str(j))
        for i, prompt in enumerate(trained)
        for j, other in enumerate(evaluated)
        if normalized(prompt) == normalized(other) or any(holds(prompt, run) for run in telling(other))
    }
    found = find_contamination(problems("train", *trained), problems("eval", *evaluated), words, common)
    assert {(overlap.training.id, overlap.evaluation.id) for overlap in found.overlaps} == expected
    for overlap in found.overlaps:
        assert overlap.same or holds(overlap.training.prompt, overlap.shared.split())
        assert overlap.same or len(overlap.shared.split()) >= words
        assert 0 < overlap.share <= 1


def test_a_report_of_nothing_is_one_line() -> None:
    report = contamination_table(find_contamination(problems("train", "x"), problems("eval", LONG)))
    (line,) = report.splitlines()
    assert line.startswith("0 of 1 training problems overlap with 0 of 1 evaluation problems; 0 stock")


def test_the_report_names_row_problem_and_words() -> None:
    found = find_contamination(
        problems("train", "x", f"{LONG} | 2", "What is |2|?"), problems("eval", LONG, "what is |2|")
    )
    lines = contamination_table(found).splitlines()
    assert lines[0].startswith("2 of 3 training problems overlap with 2 of 2 evaluation problems; 0 stock")
    assert lines[4] == r"| train 2 | eval 1 | yes | 1.00 | what is \|2\| |"
    assert lines[5] == f"| train 1 | eval 0 | no | 1.00 | {' '.join(words_of(LONG))} |"


@pytest.mark.parametrize(
    ("name", "file", "rows", "same", "near"),
    [
        ("openai/gsm8k", "gsm8k_train", 0, {}, {}),
        (
            "BytedTsinghua-SIA/DAPO-Math-17k",
            "dapo_math_17k",
            192,
            {"HuggingFaceH4/MATH-500": 7, "math-ai/amc23": 7},
            {"HuggingFaceH4/MATH-500": 13, "math-ai/amc23": 22},
        ),
        ("DigitalLearningGmbH/MATH-lighteval", "math_train", 104, {}, {"HuggingFaceH4/MATH-500": 9}),
    ],
)
def test_real_sets(
    name: str, file: str, rows: int, same: dict[str, int], near: dict[str, int], real_data: Path
) -> None:
    held_out = [
        p for source, f in EVALUATION.items() for p in read_problems(source, real_data / f"{f}.parquet").items
    ]
    trained = read_problems(name, real_data / f"{file}.parquet", bad_rows="skip").items
    found = find_contamination(trained, held_out)
    assert len(found.rows()) == rows

    def counts_by_source(overlaps: list) -> dict[str, int]:
        pairs = {(overlap.evaluation.source, overlap.evaluation.id) for overlap in overlaps}
        sources = [source for source, _ in pairs]
        return {source: sources.count(source) for source in sources}

    assert counts_by_source([overlap for overlap in found.overlaps if overlap.same]) == same
    assert counts_by_source([overlap for overlap in found.overlaps if overlap.share >= 0.5]) == near
