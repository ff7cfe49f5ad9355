from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.rewards.fast_equality import MAX_CHARS, decide_without_algebra
from megatron_parallel_r1.rewards.verification import extract_answer
from megatron_parallel_r1.rewards.verifier import Verifier, equivalent


@pytest.mark.parametrize(
    ("answer", "reference", "correct", "reason"),
    [
        ("72", "72", True, "text"),
        (" odd ", "odd", True, "text"),
        (None, "72", False, "empty"),
        (" ", "72", False, "empty"),
        ("", "", False, "empty"),
        ("1,080", "1080", True, "number"),
        ("73", "72", False, "number"),
        (r"\frac{3}{6}", "0.5", True, "number"),
        (r"0.4", r"40\%", True, "number"),
        (r"54\text{ gallons}", "54", True, "normalised"),
        ("D", r"\text{(D)}", True, "normalised"),
        ("x=5", "5", True, "normalised"),
        ("none", "5", False, "normalised"),
        ("12", r"\text{even}", False, "normalised"),
        ("two-lines", r"\text{two lines}", True, "normalised"),
        ("silent", "listen", False, "normalised"),
        ("the answer is 5 apples", "5", True, "normalised"),
        (r"0.\overline{3}", r"\frac{1}{3}", True, "number"),
        ("2 pi", r"2\pi", True, "normalised"),
        (r"\sqrt{2}", r"\sqrt{3}", False, "value"),
        (r"\frac{\pi}{6}", "30", False, "value"),
        ("40", r"(40, 50)", False, "value"),
        ("x" * MAX_CHARS + "y", "5", False, "too long"),
        ("x" * 10**6, "x" * 10**6, True, "text"),
    ],
)
def test_settled_without_algebra(answer: str | None, reference: str, correct: bool, reason: str) -> None:
    verdict = decide_without_algebra(answer, reference)
    assert verdict and (verdict.correct, verdict.reason) == (correct, reason)


RESPELLED = [
    (r"(x+1)^2", r"x^2 + 2x + 1"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    (r"\sqrt{12}", r"2\sqrt3"),
    (r"\left(\tfrac12, 3\right)", "(1/2,3)"),
    (r"(0.5, 3)", r"\left( \frac{1}{2}, 3 \right)"),
    (r"\{2, 1\}", r"\{1,2\}"),
    ("-3, 3", "3,-3"),
    ("-2, -12", r"-2 \text{ or } -12"),
    (r"(-inf, 3]", r"(-\infty,3]"),
    (r"(2,\infty) \cup (-\infty,-2)", r"(-\infty,-2) \cup (2, \infty)"),
    (r"\begin{bmatrix} 0.5 \\ 2 \end{bmatrix}", r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}"),
    ("y = 1 + 2x", "y = 2x + 1"),
    (r"2^{10}", "1024"),
    (r"i - 3", "-3+i"),
    (r"0.5\pi", r"\frac{\pi}{2}"),
    ("pi/2", r"\frac{\pi}{2}"),
    ("2*sqrt(3)/3", r"\frac{2}{\sqrt{3}}"),
    ("the answer is 1 + x", "x + 1"),
    ("bca", "abc"),
    ("2", "2 s"),
    ("b", r"\text{(B)}"),
    (r"30^\circ, 60^\circ", "60, 30"),
    (r"x \in [0, 0.5]", r"\left[0, \frac12\right]"),
    ("x = 1 or x = 2", "1, 2"),
    (r"1.5 \times 10^{-3}", "0.0015"),
    (r"\left(\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right)", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"7 \pm \sqrt{2}", r"7 - \sqrt{2}, 7 + \sqrt{2}"),
    (r"-12 \text{ or } -30", r"-30, -12"),
]
DIFFERENT = [
    ("(2,1)", "(1,2)"),
    ("[1,2]", "(1,2)"),
    ("1, 2, 3, 42", "42"),
    ("41 or 42", "42"),
    ("y=5", "x=5"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{3}}{2}"),
    (r"(x+1)^2", r"x^2 + 1"),
    ("five", "5"),
    ("3 million", "3"),
    ("0=0", "x=5"),
    (r"\emptyset", r"\{1\}"),
    ("nan", "1"),
    ("import os", "os"),
]


@pytest.mark.parametrize(("answer", "reference"), RESPELLED)
def test_respelled_answers(answer: str, reference: str, verifier: Verifier) -> None:
    assert verifier.check(answer, reference).correct


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_different_answers(answer: str, reference: str, verifier: Verifier) -> None:
    assert not verifier.check(answer, reference).correct


def test_equivalent_takes_every_way() -> None:
    assert equivalent("72", "72") and equivalent("72.0", "72") and equivalent("2x+1", "1+2x")
    assert not equivalent("71", "72") and not equivalent("2x+2", "1+2x") and not equivalent(None, "72")


@given(st.text(max_size=50), st.text(max_size=50))
def test_settling_never_fails(answer: str, reference: str) -> None:
    decide_without_algebra(answer, reference)


def math_solutions(real_data: Path) -> list[str]:
    pandas = pytest.importorskip("pandas")
    return pandas.read_parquet(real_data / "math_train.parquet")["solution"].tolist()


def respellings(answer: str) -> list[str]:
    """The same answer as other people write it."""
    spelled = [
        f"$\\displaystyle {answer.replace(chr(92) + 'frac', chr(92) + 'dfrac')}$.",
        answer.replace(r"\left", "").replace(r"\right", ""),
        f" {answer}\\, ",
    ]
    if re.fullmatch(r"-?\d+", answer):
        number = int(answer)
        spelled += [
            f"{number}.0",
            f"{number:,}",
            f"{number:,}".replace(",", "{,}"),
            f"x = {number}",
            f"+{number}",
        ]
        spelled += [rf"{number}^\circ", rf"{number}\text{{ cm}}^2", f"{number} apples", rf"\text{{{number}}}"]
        spelled += [rf"\frac{{{2 * number}}}{{2}}", f"the answer is {number}", rf"\${number}", rf"{number}\%"]
        return [text for text in spelled if not text.startswith("+-")]
    if fraction := re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", answer):
        sign, top, bottom = fraction[1], int(fraction[2]), int(fraction[3])
        spelled += [f"{sign}{top}/{bottom}", rf"\frac{{{sign}{top}}}{{{bottom}}}", f"x={answer}"]
        spelled += [rf"{sign}\tfrac{{{3 * top}}}{{{3 * bottom}}}", f"{sign}{top / bottom:.9f}"]
    return spelled


def check_references(solutions: list[str]) -> int:
    answers = [extract_answer(solution) for solution in solutions]
    for answer, solution in zip(answers, solutions, strict=True):
        if answer is None:  # two solutions of this data set have an empty box
            assert re.search(r"\\boxed\{\s*\}", solution), solution
        else:
            assert answer.count("{") - answer.count(r"\{") == answer.count("}") - answer.count(r"\}"), answer
            assert equivalent(answer, answer), answer
            for spelled in respellings(answer):
                assert equivalent(spelled, answer), (spelled, answer)
    return sum(answer is not None for answer in answers)


def test_reference_answers_are_extracted_and_equal_themselves(real_data: Path) -> None:
    assert check_references(math_solutions(real_data)[::25]) == 300


@pytest.mark.slow
def test_all_reference_answers(real_data: Path) -> None:
    assert check_references(math_solutions(real_data)) == 7498
