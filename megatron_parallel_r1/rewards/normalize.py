r"""Rewrites an answer, LaTeX or plain text, into one canonical spelling, without algebra.

`clean` removes what carries no meaning (dollar signs, spacing commands, a final full stop); `canonical` also
unifies fractions, roots, text, units, percent and degree signs, and splits off a leading `x =`. Two answers
with the same canonical form are the same answer; the converse needs algebra.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_parallel_r1.rewards.number import Number, read_number

_UNICODE = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ",
        "°": r"^\circ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ",
        "√": r"\sqrt ", "≈": r"\approx ", "％": "%", "，": ",", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    }
)  # fmt: skip

_BLANKS = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s+")
_MATH_MARKS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]!]")  # after a backslash it ends a matrix row
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3}(?!\d))")
_CLOSING = " .,;:"
_ROUGHLY = re.compile(r"\s{0,9}(?:\\displaystyle\s{0,9})?\\approx(?:eq)?(?![A-Za-z])")
_BARE_PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")
_BARE_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt\s?(\d+|[A-Za-z](?![A-Za-z]))")
_ROOT_OF = re.compile(r"(?:\\|(?<![A-Za-z\\]))sqrt\s?\(([^()]*)\)")
_OTHER_NAMES = re.compile(r"\*\*|\\(?:varnothing|[lr]angle)(?![A-Za-z])")
_ONE_NAME = {"**": "^", r"\varnothing": r"\emptyset", r"\langle": "(", r"\rangle": ")"}
_LEAD = re.compile(
    r"(?P<words>[A-Za-z][A-Za-z' ]{0,80}?)(?: (?:is|are|was|equals) |(?P<colon>: ?))(?=[-+.(\\]?[\d(\\.{\[])"
)
_BEFORE_COLON = frozenset({"answer", "result", "solution", "value", "total", "sum"})
_NO_LEAD = frozenset({"if", "not", "no", "or", "when", "where", "suppose", "unless"})

_SIZES = re.compile(r"\\(?:left|right)\.|\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])")
_FRACTION_NAMES = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_ARGUMENT = r"\s?(?:([0-9A-Za-z])|\{\s?([^{}]*?)\s?\})"
_FRACTION = re.compile(rf"\\frac{_ARGUMENT}{_ARGUMENT}")
_ROOT = re.compile(r"\\sqrt\s?([0-9A-Za-z])")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|operatorname)\s?\{(?P<text>[^{}]*)\}")
_UNIT_TEXT = re.compile(rf"(?<=[\d}})%.])\s?{_TEXT.pattern}(?:\s?\^\{{?[23]\}}?)?$")
_MEASURED = r"(?P<number>[-+]?(?:\d[\d.,/ ]*|\.\d+|\d*\s?\\frac\{[^{}]*\}\{[^{}]*\}))\s?"
_UNIT_RATE = re.compile(
    _MEASURED + r"(?:[ckm]?m|ft|mi|miles|k?g|lb|L|dollars)\s?/\s?(?:s|sec|h|hr|hour|min|[ckm]?m|L)"
    r"(?:\s?\^\{?[23]\}?)?"
)
_UNIT_WORDS = re.compile(_MEASURED + r"(?P<text>[A-Za-z]{2,}(?:[. ]+[A-Za-z]{2,})*\.?)(?:\s?\^\{?[23]\}?)?")
_NOT_UNITS = frozenset(
    {
        "pi", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "mod", "or", "and", "to",
        "over", "times", "choose", "base", "factorial", "squared", "cubed", "half", "third", "quarter",
        "dozen", "score", "hundred", "thousand", "million", "billion", "trillion", "inf", "infinity", "am",
        "pm", "percent", "than", "not", "plus", "minus",
    }
)  # fmt: skip
_PERCENT = re.compile(r"\s?(?:\\?%|(?<![A-Za-z])percent)$")
_DEGREE = re.compile(r"\s?(?:\^\s?\{?\s?\\circ\s?\}?|\\degree)$")
_INNER_BLANK = re.compile(r"(?<!\d) (?![A-Za-z])|(?<![A-Za-z]) (?!\d)")
_ASSIGNMENT = re.compile(
    r"(?P<name>(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?(?:\([a-z]\))?|[A-Z]{2,3})=(?P<body>[^=<>,;]+)"
)
_CHOICE = re.compile(r"\(([A-Z])\)")
_WORD = re.compile(r"[A-Za-z]{2}")
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ -][A-Za-z]+)*")


@dataclass(frozen=True, slots=True)
class Canonical:
    r"""The canonical spelling of an answer.

    Attributes:
        name: the left side of a leading `x =`, else None.
        body: the rest, without blanks except between letters or digits.
        number: the exact value of the body where it is a plain number.
        has_words: whether a `\text{…}` of more than single letters was dropped or unwrapped.
    """

    name: str | None
    body: str
    number: Number | None
    has_words: bool

    @property
    def is_words(self) -> bool:
        """Whether the body is plain words, such as `odd` or `none`: a text answer, not a formula."""
        return _WORDS.fullmatch(self.body) is not None

    @property
    def letters(self) -> str:
        """The words without separators: `non-zero` is `nonzero`."""
        return self.body.replace(" ", "").replace("-", "")

    @property
    def may_be_product(self) -> bool:
        """Whether the letters may be a product: `abc` equals `bca`, but `listen` is not `silent`."""
        return len(self.body) <= 3

    @property
    def is_formula(self) -> bool:
        """Whether each letter of the body is a variable."""
        return self.number is not None or not self.has_words


def clean(text: str) -> str:
    """Removes dollar signs, spacing commands, closing punctuation and a lead-in (`the answer is`).

    The result is still LaTeX, with its blanks; bare names (`2 pi`, `sqrt(3)`, `x**2`) become LaTeX.
    """
    text = text if text.isascii() else text.translate(_UNICODE)
    text = _MATH_MARKS.sub("", _THOUSANDS.sub("", text))
    text = _BLANKS.sub(" ", _in_latex(text)).strip().rstrip(_CLOSING)
    return _without_lead(text)


def canonical(text: str) -> Canonical:
    """Returns the canonical spelling of an answer of at most a few thousand characters."""
    cleaned = clean(text)
    has_words = any(_WORD.search(match["text"]) for match in _TEXT.finditer(cleaned))
    body = _FRACTION_NAMES.sub(r"\\frac", _SIZES.sub("", cleaned))
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
    return Canonical(name, body, read_number(body), has_words)


def _without_unit(body: str) -> str:
    r"""Drops `\text{ cm}^2` after anything and ` cm^2` after a number; unwraps any other `\text`."""
    if (unit := _UNIT_TEXT.search(body)) and _is_unit(unit["text"]):
        body = body[: unit.start()]
    body = _without_lead(" ".join(_TEXT.sub(r" \g<text> ", body).split()).rstrip(_CLOSING))
    if rate := _UNIT_RATE.fullmatch(body):
        return rate["number"].rstrip(_CLOSING)
    if (words := _UNIT_WORDS.fullmatch(body)) and _is_unit(words["text"]):
        body = words["number"].rstrip(_CLOSING)
    return body


def _is_unit(text: str) -> bool:
    words = text.casefold().replace(".", "").split()
    return all(word.isalpha() for word in words) and bool(words) and _NOT_UNITS.isdisjoint(words)


def _in_latex(text: str) -> str:
    """Rewrites bare names as LaTeX; most answers have none."""
    if "\\approx" in text and (roughly := _ROUGHLY.match(text)):
        text = text[roughly.end() :]
    if "sqrt" in text:
        text = _ROOT_OF.sub(r"\\sqrt{\1}", _BARE_ROOT.sub(r"\\sqrt{\1}", text))
    if "pi" in text:
        text = _BARE_PI.sub(r"\\pi ", text)
    if "**" in text or "ang" in text or "var" in text:
        text = _OTHER_NAMES.sub(lambda match: _ONE_NAME[match[0]], text)
    return text


def _without_lead(text: str) -> str:
    """Drops `The answer is` or `Total:` before a formula."""
    if not (lead := _LEAD.match(text)):
        return text
    words = lead["words"].casefold().split()
    known = not lead["colon"] or words[-1] in _BEFORE_COLON
    return text[lead.end() :] if known and _NO_LEAD.isdisjoint(words) else text
