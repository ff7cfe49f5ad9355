r"""One spelling for an answer: cheap rewriting of LaTeX and plain text, no algebra.

`clean` removes what never carries meaning (dollars, spacing commands, a full stop at the end); `canonical`
goes on to one spelling of fractions, roots, text, units, percent and degree signs, and splits off a leading
`x =`. Two answers with the same canonical form are the same answer; the converse needs algebra.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_parallel_r1.rewards.number import Number, read_number

_UNICODE = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ",
        "°": r"^\circ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ",
        "％": "%", "，": ",", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    }
)  # fmt: skip

_BLANKS = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s+")
_MATH_MARKS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]!]")  # behind a backslash it ends a matrix row
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3}(?!\d))")
_CLOSING = " .,;:"

_SIZES = re.compile(r"\\(?:left|right)\.|\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])")
_FRACTION_NAMES = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_ARGUMENT = r"\s?(?:([0-9A-Za-z])|\{\s?([^{}]*?)\s?\})"
_FRACTION = re.compile(rf"\\frac{_ARGUMENT}{_ARGUMENT}")
_ROOT = re.compile(r"\\sqrt\s?([0-9A-Za-z])")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|operatorname)\s?\{(?P<text>[^{}]*)\}")
_UNIT_TEXT = re.compile(rf"(?<=[\d}})%.])\s?{_TEXT.pattern}(?:\s?\^\{{?[23]\}}?)?$")
_UNIT_WORDS = re.compile(
    r"(?P<number>[-+]?(?:\d[\d.,/ ]*|\.\d+|\d*\s?\\frac\{[^{}]*\}\{[^{}]*\}))\s?"
    r"(?P<text>[A-Za-z]{2,}(?:[. ]+[A-Za-z]{2,})*\.?)(?:\s?\^\{?[23]\}?)?"
)
_NOT_UNITS = frozenset(
    {
        "pi", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "mod", "or", "and", "to",
        "over", "times", "choose", "base", "factorial", "squared", "cubed", "half", "third", "quarter",
        "dozen", "score", "hundred", "thousand", "million", "billion", "trillion", "inf", "infinity", "am",
        "pm", "percent",
    }
)  # fmt: skip
_PERCENT = re.compile(r"\s?(?:\\?%|(?<![A-Za-z])percent)$")
_DEGREE = re.compile(r"\s?(?:\^\s?\{?\s?\\circ\s?\}?|\\degree)$")
_INNER_BLANK = re.compile(r"(?<!\d) (?![A-Za-z])|(?<![A-Za-z]) (?!\d)")
_ASSIGNMENT = re.compile(
    r"(?P<name>(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?(?:\([a-z]\))?|[A-Z]{2,3})=(?P<body>[^=<>,;]+)"
)
_CHOICE = re.compile(r"\(([A-Z])\)")
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ -][A-Za-z]+)*")


@dataclass(frozen=True, slots=True)
class Canonical:
    """An answer's one spelling.

    Attributes:
        name: what a leading `x =` assigned to, else None.
        body: the rest, without blanks save between letters or digits.
        number: the body's exact value where it is a plain number.
    """

    name: str | None
    body: str
    number: Number | None

    @property
    def is_words(self) -> bool:
        """Plain words, such as `odd` or `none`: a text answer, no formula."""
        return _WORDS.fullmatch(self.body) is not None


def clean(text: str) -> str:
    """The answer without dollars, spacing commands and closing punctuation; still LaTeX with its blanks."""
    text = _THOUSANDS.sub("", text.translate(_UNICODE))
    return _BLANKS.sub(" ", _MATH_MARKS.sub("", text)).strip().rstrip(_CLOSING)


def canonical(text: str) -> Canonical:
    """The one spelling of an answer. For answers of at most a few thousand characters."""
    body = _FRACTION_NAMES.sub(r"\\frac", _SIZES.sub("", clean(text)))
    body = _ROOT.sub(r"\\sqrt{\1}", _FRACTION.sub(r"\\frac{\1\2}{\3\4}", body))
    body = _DEGREE.sub("", _PERCENT.sub("%", _without_unit(body)))
    body = _INNER_BLANK.sub("", body)
    if body[:1] == "{" and body.find("}") == len(body) - 1:
        body = body[1:-1]
    name = None
    if assignment := _ASSIGNMENT.fullmatch(body):
        name, body = assignment["name"], assignment["body"]
    if choice := _CHOICE.fullmatch(body):
        body = choice[1]
    if _WORDS.fullmatch(body):
        body = body.casefold()
    return Canonical(name, body, read_number(body))


def _without_unit(body: str) -> str:
    r"""Drops `\text{ cm}^2` behind anything and ` cm^2` behind a number; unwraps any other `\text`."""
    if (unit := _UNIT_TEXT.search(body)) and _is_unit(unit["text"]):
        body = body[: unit.start()]
    body = " ".join(_TEXT.sub(r" \g<text> ", body).split()).rstrip(_CLOSING)
    if (words := _UNIT_WORDS.fullmatch(body)) and _is_unit(words["text"]):
        body = words["number"].rstrip(_CLOSING)
    return body


def _is_unit(text: str) -> bool:
    words = text.casefold().replace(".", "").split()
    return all(word.isalpha() for word in words) and bool(words) and _NOT_UNITS.isdisjoint(words)
