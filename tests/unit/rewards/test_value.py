from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.rewards.normalize import canonical
from megatron_parallel_r1.rewards.numeric import MAX_CHARS, differ, read_value
from megatron_parallel_r1.rewards.structure import Parts, read_parts, same_parts

X = (read_value("x") or 0).real


def value(text: str) -> complex | None:
    return read_value(canonical(text).body)


def parts(text: str) -> Parts | None:
    return read_parts(canonical(text).body)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 7),
        ("-1.5", -1.5),
        (r"\frac{1}{4}", 0.25),
        (r"\frac{1}{\sqrt{2}}", 1 / math.sqrt(2)),
        (r"\sqrt[3]{8}", 2),
        (r"\sqrt{-4}", 2j),
        (r"2\sqrt{3}\pi", 2 * math.sqrt(3) * math.pi),
        ("2(3+4)", 14),
        ("-2^2", -4),
        ("2^{-1}", 0.5),
        ("6/4", 1.5),
        (r"6 \div 3 \cdot 2", 4),
        ("3+4i", 3 + 4j),
        ("e^2", math.e**2),
        ("(5)", 5),
        ("2x^2 - x + 1", 2 * X**2 - X + 1),
        ("(x+1)(x-1)", X**2 - 1),
        ("xx", X**2),
    ],
)
def test_one_formula_by_hand(text: str, expected: complex) -> None:
    assert value(text) == pytest.approx(complex(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("text", "items", "kind"),
    [
        ("(1, 2)", ("1", "2"), "()"),
        (r"\left[ 0, \frac12 \right)", ("0", r"\frac{1}{2}"), "[)"),
        (r"\{3, 1\}", ("3", "1"), r"\{\}"),
        (r"\{5\}", ("5",), r"\{\}"),
        ("1, -2, 3", ("1", "-2", "3"), "list"),
        (r"2 \text{ or } 3", ("2", "3"), "list"),
        (r"1 \pm \sqrt{2}", (r"1+\sqrt{2}", r"1-\sqrt{2}"), "list"),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", ("1", "2", "3", "4"), "2x2"),
        (r"\begin{bmatrix} 1 \\ \frac{1}{2} \\ \end{bmatrix}", ("1", r"\frac{1}{2}"), "2x1"),
        (r"\begin{vmatrix} 1 \\ 2 \end{vmatrix}", ("1", "2"), "v2x1"),
        (r"[0, 1) \cup (2, 3]", ("[0,1)", "(2,3]"), "union"),
        ("x < 1 or x > 2", (r"(-\infty,1)", r"(2,\infty)"), "union"),
        ("x > 1 and x < 2", ("1", "2"), "()"),
        (r"5 > x \ge 2", ("2", "5"), "[)"),
    ],
)
def test_several_parts_by_hand(text: str, items: tuple[str, ...], kind: str) -> None:
    read = parts(text)
    assert read and (read.items, read.kind) == (items, kind)


def test_assignments_are_ordered_by_name() -> None:
    assert (
        parts("y=2, x=1") == parts("(y,x)=(2,1)") == parts("(x=1,y=2)") == Parts("()", ("1", "2"), ("x", "y"))
    )


@pytest.mark.parametrize(
    "text", ["", "5", "(5)", "(x+1)(x-2)", "x+1", "a<b", "(1,2", r"\pm 1 \pm 2", "1<x>2"]
)
def test_what_has_no_parts(text: str) -> None:
    assert parts(text) is None


@pytest.mark.parametrize(
    "text",
    ["", "x=", "3 4", r"1\frac{1}{2}x", "1/2x", "x2", "5!", r"\sin x", "2 or 3", "abc", "x_1", "|x|",
     "2^3^4", "x^", "(", "1+", r"\frac{1}", r"\frac{1}{0}", "0^{-1}", "(-8)^{1/3}", r"\sqrt[3]{-8}", r"\pm 3",
     "40%", "3:4", "2m", "1,000\\pi",
     "(1,2)", "1,2", r"\sqrt{2}-1.41421356237", "33_4",
     "2^{2000}", "10^{12}+1", "9^{9^{9}}", "(" * 50 + "1" + ")" * 50, "x" * (MAX_CHARS + 1),
     r"\begin{pmatrix} 1 \\ \sin x \end{pmatrix}", r"\begin{pmatrix} 1"],
)  # fmt: skip
def test_what_is_not_read_for_sure_has_no_value(text: str) -> None:
    assert value(text) is None


@pytest.mark.parametrize(
    ("one", "other", "unlike"),
    [
        ("2", "3", True),
        ("2", "-2", True),
        ("1.41421", r"\sqrt{2}", False),
        (r"\sqrt{2}", r"\sqrt{3}", True),
        ("x", "y", True),
        ("X", "x", False),
        ("x+1", "1+x", False),
        ("0.0000001", "0", True),  # relative, however small
        (r"(\frac{1}{2})^{60}", r"(\frac{1}{2})^{61}", True),
        ("0", "0", False),
    ],
)
def test_what_differs_by_hand(one: str, other: str, unlike: bool) -> None:
    left, right = value(one), value(other)
    assert left is not None and right is not None
    assert differ(left, right) is differ(right, left) is unlike


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("(1,2)", "(2,1)", False),
        ("(1,2)", "[1,2]", False),
        ("(1,2)", r"\{2,1\}", False),
        ("(1,2)", r"\{1,2\}", False),
        ("(1,2)", "1,2", True),
        ("(1,2)", "2,1", False),
        ("1,2", "2,1", True),
        ("1,1", "1,2", False),
        ("1,1,2", "1,2,2", False),
        (r"\{1,1,2\}", r"\{2,1\}", True),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1,2)", False),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", False),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}", False),
        (r"(0,1) \cup (1,2]", r"(1,2] \cup (0,1)", True),
        (r"(0,1] \cup (1,2]", "(0,2]", None),  # algebra says yes
        (r"(0,1] \cup (1,2]", r"(0,1) \cup (3,4]", False),
        (r"(-\infty, 3)", r"(\infty, 3)", False),
        ("x=1, y=2", "(1,2)", True),
        ("x=1, y=2", "x=1, z=2", False),
        ("x>2", "y>2", False),
    ],
)
def test_which_parts_are_the_same(one: str, other: str, alike: bool | None) -> None:
    left, right = parts(one), parts(other)
    assert left and right
    assert same_parts(left, right, str.__eq__) is same_parts(right, left, str.__eq__) is alike


def formula(rng: random.Random, depth: int) -> tuple[str, str]:
    """Two spellings of one random formula: terms and factors in two orders, fractions in two ways."""
    if depth == 0:
        leaf = rng.choice(["2", "3", "7", "x", "y", r"\pi", r"\sqrt{5}", "0.5"])
        return leaf, {"0.5": r"\frac{1}{2}"}.get(leaf, leaf)
    (a, b), (c, d) = formula(rng, depth - 1), formula(rng, depth - 1)
    return rng.choice(
        [
            (f"({a}+{c})", f"({d}+{b})"),
            (f"({a})({c})", f"({d})\\cdot({b})"),
            (f"\\frac{{{a}}}{{{c}}}", f"({b})/({d})"),
            (f"({a})^2", f"({b})({b})"),
            (f"-{a}", f"(0-{b})"),
        ]
    )


@given(st.integers(0, 10**9), st.integers(0, 3))
def test_spellings_of_a_formula_never_differ(seed: int, depth: int) -> None:
    one, other = map(value, formula(random.Random(seed), depth))
    assert one is None or other is None or not differ(one, other)


@given(st.text(alphabet="()[]{},+-*/^_ 019xie\\.&", max_size=60) | st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    read = value(text)
    assert read is None or not differ(read, read)
    parts(text)
