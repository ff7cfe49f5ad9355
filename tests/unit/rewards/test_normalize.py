from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.rewards.normalize import canonical, clean
from megatron_parallel_r1.rewards.number import MAX_DIGITS, read_number, same_number


@pytest.mark.parametrize(
    ("text", "value", "percent", "places"),
    [
        ("72", Fraction(72), False, 0),
        ("-007", Fraction(-7), False, 0),
        ("1,080", Fraction(1080), False, 0),
        ("109,200,000.50", Fraction(218400001, 2), False, 2),
        ("4 989 600", Fraction(4989600), False, 0),
        (".155", Fraction(31, 200), False, 3),
        ("3.", Fraction(3), False, 0),
        ("3/4", Fraction(3, 4), False, 0),
        ("-3/-4", Fraction(3, 4), False, 0),
        (r"-\frac{-1}{2}", Fraction(1, 2), False, 0),
        (r"\frac{0.5}{2}", Fraction(1, 4), False, 0),
        (r"-1\frac{1}{2}", Fraction(-3, 2), False, 0),
        ("1 1/2", Fraction(3, 2), False, 0),
        ("40%", Fraction(40), True, 0),
        (r"0.\overline{3}", Fraction(1, 3), False, 0),
        (r"-.1\overline{6}", Fraction(-1, 6), False, 0),
        (r"2.\overline{27}", Fraction(25, 11), False, 0),
        (r"0.\dot{9}", Fraction(1), False, 0),
        (r".\bar{3}", Fraction(1, 3), False, 0),
    ],
)
def test_numbers_by_hand(text: str, value: Fraction, percent: bool, places: int) -> None:
    number = read_number(text)
    assert number is not None
    assert (number.value, number.percent, number.places) == (value, percent, places)


@pytest.mark.parametrize(
    "text",
    ["", "x", "1,08", "12,34,567", "1/0", r"\frac{1}{0}", "1e9", "1.2.3", "--1", "3 4", "1_000", "٣",
     "9" * (MAX_DIGITS + 1), r"2\frac{3}{2}", "1/2/3", "(1)", "0x10", r"\overline{3}", "nan", "inf", "∞"],
)  # fmt: skip
def test_what_is_no_plain_number(text: str) -> None:
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("40%", "40", True),
        ("40", "40%", True),
        ("0.4", "40%", True),
        ("40%", "2/5", True),
        ("40%", "0.4%", False),
        ("4", "40%", False),
        ("0.333333", "1/3", True),
        ("0.33333", "1/3", False),  # five places are too few
        ("0.666666", "2/3", False),  # cut, not rounded
        ("0.6666666", "2/3", True),  # a seventh place may be cut
        ("0.6666665", "2/3", False),
        ("1/3", "0.333333", True),  # references are rounded too
        ("1/3", "0.33", False),
        ("0.0000001", "0", False),
        ("0.000000", "1/99999999", False),
        ("1000000.0000001", "1000000", False),
        ("0.10", "1/10", True),
    ],
)
def test_which_numbers_are_the_same(answer: str, reference: str, same: bool) -> None:
    left, right = read_number(answer), read_number(reference)
    assert left and right
    assert same_number(left, right) is same


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_spellings_of_a_fraction_agree_and_those_of_two_differ(one: Fraction, other: Fraction) -> None:
    def spellings(value: Fraction) -> list[str]:
        top, bottom = value.numerator, value.denominator
        spelled = [f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}", rf"\dfrac{{{-top}}}{{{-bottom}}}"]
        whole, rest = divmod(abs(top), bottom)
        if whole and rest:
            spelled.append(rf"{'-' if top < 0 else ''}{whole}\frac{{{rest}}}{{{bottom}}}")
        if bottom == 1:
            spelled += [f"{top:,}", f"$ {top} $", f"x = {top}", f"{top}.0", f"{top} apples.", f"{top}^\\circ"]
        return spelled

    numbers = {spelling: canonical(spelling).number for spelling in spellings(one) + spellings(other)}
    for left in spellings(one):
        assert numbers[left] and numbers[left].value == one, left
        for right in spellings(other):
            assert same_number(numbers[left], numbers[right]) is (one == other)


@pytest.mark.parametrize(
    ("spellings", "body"),
    [
        (
            [r"\frac{1}{2}", r"\dfrac12", r"\tfrac 1 2", r"\frac{ 1 }2", r"$\frac12$", r"\(\frac12\)."],
            r"\frac{1}{2}",
        ),
        ([r"2\sqrt3", r"2 \sqrt{3}", r"$2\sqrt 3$", r"2\,\sqrt{ 3 }"], r"2\sqrt{3}"),
        ([r"\left( -\infty, 3 \right]", r"(-\infty,3]", "(-∞, 3]"], r"(-\infty,3]"),
        ([r"54\text{ gallons}", "54 gallons", r"54 \mbox{gallons}.", "54"], "54"),
        ([r"32\text{ cm}^2", r"32 \mathrm{cm}^{2}", "32 square cm", r"32 \text{sq. ft}"], "32"),
        ([r"7\text{ miles per hour}", "7 miles per hour"], "7"),
        ([r"40\%", "40 %", "40%", r"40\text{ percent}", "40 percent"], "40%"),
        ([r"60^\circ", r"60^{\circ}", "60°", r"60\degree", "60 degrees"], "60"),
        ([r"\text{(D)}", "(D)", "D", r"\textbf{D}"], "D"),
        ([r"\text{Odd}", "odd", r"\mbox{odd}"], "odd"),
        ([r"\$1,\!657", r"1{,}657"], "1657"),
        ([r"x^2 + 1", "x^2+1", r"x^2\;+\;1"], "x^2+1"),
        (["3, -3", "3,-3", r"3,\ -3"], "3,-3"),
        ([r"-2 \text{ or } -12", "-2 or -12"], "-2or-12"),
        (["{5}", "5", "5.", " 5 ;"], "5"),
        ([r"\sin x", r"\sin  x"], r"\sin x"),
        (["2 pi", "2pi", "2π", r"2\pi", r"2 \pi"], r"2\pi"),
        (["sqrt(3)", "sqrt3", "sqrt 3", "√3", r"\sqrt(3)", r"\sqrt3"], r"\sqrt{3}"),
        (["x**2", "x^2"], "x^2"),
        ([r"\langle 1, 2\rangle", "(1,2)"], "(1,2)"),
        ([r"\varnothing", r"\emptyset"], r"\emptyset"),
        ([r"\approx 5", "≈ 5", "5"], "5"),
        (["5 m/s", "5 km/h", r"5\text{ m/s}", r"5 \mathrm{m}/\mathrm{s}^2", "5 ft / sec"], "5"),
        (["the answer is 5", "The answer is 5 apples.", "There are 5 ways", "x is 5", "Total: 5"], "5"),
        ([r"\text{the answer is } 5", r"\text{Answer: }5"], "5"),
        # What carries meaning stays.
        (["3 million"], "3million"),
        ([r"3\text{ million}"], "3million"),
        (["at least 5"], "at least5"),
        (["if x is 5"], "if x is5"),
        (["the answer is not 5"], "the answer is not5"),
        (["5 is 5"], "5is5"),
        (["spin"], "spin"),
        (["5 x/y"], "5x/y"),
        (["lambda: 42"], "lambda:42"),
        (["the number is 5 less than ten"], "5less than ten"),
        (["7 am"], "7am"),
        (["3 4"], "3 4"),
        ([".5"], ".5"),
        (["(100,200)"], "(100,200)"),
    ],
)
def test_one_spelling(spellings: list[str], body: str) -> None:
    assert {canonical(spelling).body for spelling in spellings} == {body}


@pytest.mark.parametrize(
    ("text", "name", "body"),
    [
        ("x = 5", "x", "5"),
        (r"k = \frac{-33}{2}", "k", r"\frac{-33}{2}"),
        (r"\theta=30^\circ", r"\theta", "30"),
        ("f(x) = 2x", "f(x)", "2x"),
        ("AB=12", "AB", "12"),
        ("x_1 = 2", "x_1", "2"),
        ("2x = 4", None, "2x=4"),
        ("AB=9, CD=4", None, "AB=9,CD=4"),
        ("a=b=3", None, "a=b=3"),
        ("5", None, "5"),
    ],
)
def test_a_leading_name_is_split_off(text: str, name: str | None, body: str) -> None:
    spelled = canonical(text)
    assert (spelled.name, spelled.body) == (name, body)


@given(st.text(max_size=200) | st.text(alphabet="\\{}$,.! 12abfrctextsqrt^=%", max_size=200))
def test_any_text_has_a_canonical_form_that_is_stable(text: str) -> None:
    clean(text)
    canonical(canonical(text).body)


@pytest.mark.parametrize(
    "piece", ["a", "1 ", "\\text{", "\\frac{", "1,", "a. ", "5 a", "{}", "\\sqrt ", "= ", "\\!"]
)
def test_no_pattern_backtracks(piece: str) -> None:
    canonical((piece * 1000)[:2000] + "\x00")
