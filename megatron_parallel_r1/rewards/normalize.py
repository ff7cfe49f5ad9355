r"""Rewrites an answer, LaTeX or plain text, into one canonical spelling, without algebra.

`clean` removes what carries no meaning (dollar signs of formulas, spacing commands, Markdown, a lead-in, a
final full stop); `canonical` also unifies fractions, roots, text, percent and degree signs, reads the unit
and splits off a leading `x =`. Two answers with the same canonical form are the same; the converse needs
algebra.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction

from megatron_parallel_r1.rewards.number import Number, read_number
from megatron_parallel_r1.rewards.units import CHANGES, COUNTS, PhysicalUnit, read_unit
from megatron_parallel_r1.utils.latex import HEDGES, NAME

_UNICODE = {
    **dict.fromkeys("−–—‐‑", "-"), **dict.fromkeys("·⋅∙", r"\cdot "), "×": r"\times ", "÷": r"\div ",
    "∞": r"\infty ", "°": r"^\circ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ",
    "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "√": r"\sqrt ", "≈": r"\approx ", "±": r"\pm ",
    "∈": r"\in ", "∅": r"\emptyset", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "∴": "", "…": r"\ldots",
    "⁄": "/", "‘": "'", "’": "'", "′": "'", "“": '"', "”": '"', "٫": ".", "٬": ",", "£": r"\pounds ",
    "€": r"\euro ", "¥": r"\yen ", "₹": r"\rupees ", "¢": r"\text{ cents}",
}  # fmt: skip
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")

_NUMERAL = r"\d[\d,]*(?:\.\d+)?|\.\d+"
_BLANKS = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s+")
_MATH_MARKS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]!]")  # after a backslash it ends a matrix row
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3}(?!\d))")
_LIST_COMMA = re.compile(r"(?<![\d.])(\d{1,3}), (?=\d{3}(?!\d))")  # `1, 234` is a list
_GROUPED = re.compile(r"(?<![\w.])\d{1,3}(?:(?:_\d{3})+|(?:'\d{3})+)(?![\w'])")
_POWER_OF_TEN = re.compile(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([-+]?\d{1,3})(?!\w|\.\d)")
_LETTER_TIMES = re.compile(r"(?<=\d)\s?[xX]\s?(?=10\s?\^)")
_DOTS = r"(?:\.{3}|\\[lc]?dots)"
_REPEATING = re.compile(rf"(?<!\d)(\d{{0,12}}\.\d{{0,12}}?)(?:(\d)\2\2+|(\d{{2,12}}?)\3+){_DOTS}$")
_REPETEND = re.compile(r"(?<=\.)(\d{0,12})\((\d{1,12})\)$")
_MONEY = re.compile(
    r"(?<![\w.])(?P<minus>-?\s?)"
    r"(?P<sign>(?:US|USD ?)?\\\$|^\$(?=[^$]*$)|\\(?:pounds|euro|yen|rupees)(?![a-z])"
    r"|(?:\\(?:text|mathrm)\{\s?)?(?:USD|EUR|GBP|INR|JPY|CNY|Rs\.?)(?:\s?\})?)"
    rf"\s?(?P<amount>-?(?:{_NUMERAL}))"
    r"(?P<times>\s?(?:\\text\{)?\s?(?:thousand|million|billion|trillion)(?![a-z])\}?)?"
)
_MAYBE_MONEY = re.compile(r"\$|\\[pery]|[A-Z]{3}|Rs")
_COINS = (r"\pounds", r"\euro", r"\yen", r"\rupees")
_MONEY_AFTER = re.compile(r"(?<=\d)\s?\\(pounds|euro|yen|rupees)\s?$")
_MONEY_NAMES = {
    "$": "dollars", "u": "dollars", "p": "pounds", "g": "pounds", "e": "euros", "y": "yen", "j": "yen",
    "r": "rupees", "i": "rupees", "c": "yuan",
}  # fmt: skip
_CLOSING = " .,;:"
_BOLD = re.compile(r"^(\*\*|__|[`'\"])(.+?)\1")
_ROUGHLY = re.compile(
    r"(?:\\displaystyle\s?)?(?:\\approx(?:eq)?(?![A-Za-z])|(?i:approximately|about|roughly) )\s?"
)
_ROUGHLY_AFTER = re.compile(r"\s?(?:\\text\s?\{)?\s?\(?approximately\)?\}?$")
_BARE_PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")
_BARE_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt\s?(\d+|[A-Za-z](?![A-Za-z]))")
_BARE_FUNCTION = re.compile(r"(?<![A-Za-z\\])(sin|cos|tan|log|ln)(?![A-Za-z])")
_ROOT_OF = re.compile(r"(?:\\|(?<![A-Za-z\\]))sqrt\s?\(([^()]*)\)")
_OTHER_NAMES = re.compile(r"\*\*|\\(?:varnothing|[lr]angle|(?:leq|geq)(?:slant)?|lt|gt|neq)(?![A-Za-z])")
_ONE_NAME = {
    "**": "^", r"\varnothing": r"\emptyset", r"\langle": "(", r"\rangle": ")",
    r"\leq": r"\le ", r"\geq": r"\ge ", r"\leqslant": r"\le ", r"\geqslant": r"\ge ",
    r"\lt": "<", r"\gt": ">", r"\neq": r"\ne ",
}  # fmt: skip
_THEREFORE = re.compile(r"(?i:therefore|thus|hence|so|finally|then),? |= ?(?=[^=])")
_IS_ANSWER = re.compile(
    r"(?i:(?:the |my )?(?:(?:final|correct|right) )?(?:answer|option|choice)(?: (?:option|choice))?"
    r"(?: is:? |: ?| ))"
    r"(?!(?i:is|not|never|no)\b)"
)
_LEAD = re.compile(
    r"(?P<words>[A-Za-z][A-Za-z' ]{0,80}?)(?: (?:is|are|was|equals) |(?P<colon>: ?))"
    r"(?=[-+.(\\]?[\d(\\.{\[]|\(?[A-Za-z]\)?(?![A-Za-z]))"
)
_BEFORE_COLON = frozenset({"answer", "result", "solution", "value", "total", "sum"})
_NO_LEAD_TEXT = """
if not no when where suppose let unless wrong incorrect opposite negative reciprocal inverse half twice
double triple thrice never neither minus plus less more than false
"""
_NO_LEAD = frozenset(_NO_LEAD_TEXT.split()) | HEDGES
_HOPE = re.compile(r"[.,;]\s?(?i:I hope (?:it|this) is correct)$")

_SIZES = re.compile(r"\\(?:left|right)\.|\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])")
_FRACTION_NAMES = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_ARGUMENT = r"\s?(?:([0-9A-Za-z])|\{\s?([^{}]*?)\s?\})"
_FRACTION = re.compile(rf"\\frac{_ARGUMENT}{_ARGUMENT}")
_ROOT = re.compile(r"\\sqrt\s?([0-9A-Za-z])")
_VECTOR = re.compile(r"\\(?:vec|hat|mathbf|overrightarrow|boldsymbol)\s?\{?\s?\\?([ijk])(?:math)?\s?\}?")
_BOLD_VARIABLE = re.compile(r"(?<=[\d}])\s?\\mathbf\s?\{\s?([a-z])\s?\}")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|operatorname)\s?\{(?P<text>[^{}]*)\}")
_TEXT_UNIT = rf"{_TEXT.pattern.replace('?P<text>', '')}(?:\s?\^\s?\{{?-?[1-9]\}}?)?"
_UNIT_FRACTION = re.compile(rf"\\frac\{{({_TEXT_UNIT})\}}\{{({_TEXT_UNIT})\}}$")
_UNIT_TAIL = re.compile(rf"(?<=[\w}})%.])\s?{_TEXT_UNIT}(?:\s?(?:/|\\cdot)\s?{_TEXT_UNIT})?$")
_MEASURED = re.compile(
    r"(?P<number>[-+]?(?:\d(?:[\d.,/ ]*[\d.])?|\.\d+|\d*\s?\\frac\{[^{}]*\}\{[^{}]*\})"
    r"(?:\s?\\(?:times|cdot)\s?10\^\{?-?\d+\}?)?(?:\s?\\pi(?![a-z]))?)(?P<blank>\s?)"
    r"(?P<rest>[A-Za-z][A-Za-z .*/^{}\d-]*)"
)
_COMPOUND = re.compile(r"(?:\d+(?:\.\d+)? ?[A-Za-z]+\.?(?:,? (?:and )?)?){2,4}")
_COMPOUND_PART = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)")
_ORDINAL = re.compile(r"(?<=\d)\s?(?:\^\s?\{?\s?)?(?:\\text\s?\{)?(?:st|nd|rd|th)(?![A-Za-z])\}*$")
_IN_BASE = re.compile(r"(\w+) (?:in )?base (\d{1,2})")
_PERCENT = re.compile(r"\s?(?:\\?%|(?<![A-Za-z])percent)$")
_DEGREE = re.compile(r"\s?(?:\^\s?\{?\s?\\circ\s?\}?|\\degree)(?:\s?([CF]))?$")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_INNER_BLANK = re.compile(r"(?<!\d) (?![A-Za-z])|(?<![A-Za-z]) (?!\d)")
_NAME = rf"(?:{NAME})(?:\([a-z]\))?|[A-Z]{{2,3}}|[A-Z]?[a-z]{{3,9}}"
_ASSIGNMENT = re.compile(
    rf"(?P<name>{_NAME})\s?(?:=|\\in(?![a-z]))\s?(?P<body>[^=<>,;]+|(?:[(\[]|\\\{{)[^=<>]+)"
)
_ASSIGNED = re.compile(r"(?P<body>[^=<>,;]*\d[^=<>,;]*)\s?=\s?(?P<name>[A-Za-z])")
_DOMAIN = re.compile(r"(?P<body>.*),(?P<letter>[a-z])\\in(?P<domain>\\mathbb\{[ZN]\}|[ZN])")
_CHOICE = re.compile(r"\(([A-Z])\)")
_WORD = re.compile(r"[A-Za-z]{2}")
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ -][A-Za-z]+)*")
_SAME = {
    **dict.fromkeys(("none", "no solution", "no solutions", "empty set", r"\{\}"), r"\emptyset"),
    **dict.fromkeys(("all real numbers", "all reals", "real numbers", r"\mathbb{r}"), r"(-\infty,\infty)"),
    **dict.fromkeys(("infinity", "+infinity", "inf"), r"\infty"), "-infinity": r"-\infty", "-inf": r"-\infty",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Canonical:
    r"""The canonical spelling of an answer.

    Attributes:
        name: the left side of a leading `x =`, else None.
        body: the rest, without blanks except between letters or digits.
        number: the exact value where it is a plain number, `2 dozen` and `2 hours 30 minutes` (2.5) too.
        has_words: whether a `\text{…}` of more than single letters, no unit, was unwrapped.
        unit: the unit that was dropped, or that `number` counts.
    """

    name: str | None
    body: str
    number: Number | None
    has_words: bool
    unit: PhysicalUnit | None = None

    @property
    def is_words(self) -> bool:
        """Whether the body is plain words, such as `odd` or `none`: a text answer, not a formula."""
        return self.body == r"\emptyset" or _WORDS.fullmatch(self.body) is not None

    @property
    def letters(self) -> str:
        """The words without separators: `non-zero` is `nonzero`."""
        return self.body.replace(" ", "").replace("-", "")

    @property
    def may_be_product(self) -> bool:
        """Whether the letters may be a product: `abc` equals `bca`, but `listen` is not `silent`."""
        return len(self.body) <= 3


def clean(text: str) -> str:
    """Removes dollar signs, spacing commands, Markdown, closing punctuation and a lead-in (`the answer is`).

    The result is still LaTeX, with its blanks; bare names (`2 pi`, `sqrt(3)`, `x**2`, `1e-3`) become LaTeX.
    """
    text = _BOLD.sub(r"\2", (text if text.isascii() else _in_ascii(text)).strip())
    text = _THOUSANDS.sub("", text) if "," in text else text
    if _MAYBE_MONEY.search(text):
        text = _MONEY.sub(_money, text)
    text = _MONEY_AFTER.sub(r" \\text{\1}", text) if text.endswith(_COINS) else text
    text = _BLANKS.sub(" ", _in_latex(_MATH_MARKS.sub("", text))).strip()
    text = _HOPE.sub("", text.rstrip(" .")) if text.endswith(("correct", "correct.")) else text
    if text.endswith(("...", "dots")):
        text = _REPEATING.sub(lambda found: rf"{found[1]}\overline{{{found[2] or found[3]}}}", text)
    text = text if text.endswith("...") else text.rstrip(_CLOSING)
    return _without_lead(_LIST_COMMA.sub(r"\1;", text) if ", " in text else text)


def canonical(text: str, letters_are_units: bool = False) -> Canonical:
    """Returns the canonical spelling of an answer of at most a few thousand characters.

    Args:
        letters_are_units: read `4m^2` as `4 m^2`, for comparison with an answer that has a unit.
    """
    cleaned = clean(text)
    body = cleaned
    if "\\" in body:
        body = _BOLD_VARIABLE.sub(r"\1", _VECTOR.sub(r" \1 ", _SIZES.sub("", body)))
        body = _FRACTION.sub(r"\\frac{\1\2}{\3\4}", _FRACTION_NAMES.sub(r"\\frac", body))
        body = _ROOT.sub(r"\\sqrt{\1}", body)
    name = None
    if "=" in body or r"\in" in body:
        found = _ASSIGNMENT.fullmatch(body) or _ASSIGNED.fullmatch(body)
        if found and (len(found["name"]) == 1 or found["name"] not in CHANGES):
            name, body = found["name"], found["body"]
    body = _ORDINAL.sub("", body) if body[-1:] in ("t", "d", "h", "}") else body
    measured = _measure(body, letters_are_units)
    body = _PERCENT.sub("%", measured.body) if measured.body[-1:] in ("%", "t") else measured.body
    body = _INNER_BLANK.sub("", body) if " " in body else body
    unit = measured.unit
    if (
        ("circ" in body or "degree" in body)
        and (degree := _DEGREE.search(body))
        and not _TRIGONOMETRY.search(body)
    ):
        body = body[: degree.start()]
        unit = read_unit({"C": "celsius", "F": "fahrenheit"}.get(degree[1], "degree"))
    if body[:1] == "{" and body.find("}") == len(body) - 1:
        body = body[1:-1]
    if choice := _CHOICE.fullmatch(body):
        body = choice[1]
    if _WORDS.fullmatch(body):
        body = body.casefold()
    body = _SAME.get(body.casefold(), body)
    if family := _DOMAIN.fullmatch(body):  # the letter of a family of answers is arbitrary
        letter = rf"(?<![A-Za-z\\]){family['letter']}(?![A-Za-z])"
        body = f"{re.sub(letter, 'k', family['body'])},k\\in{family['domain']}"
    return Canonical(name, body, measured.number or read_number(body), measured.has_words, unit)


def _measure(body: str, letters_are_units: bool) -> Canonical:
    r"""Drops `\text{ cm}^2` after anything and ` cm^2` after a number; unwraps any other `\text`."""
    if _COMPOUND.fullmatch(written := _unwrapped(body)):
        return _compound(written)
    has_words = False
    if written != body:
        body = _UNIT_FRACTION.sub(r"\1/\2", body)
        if (tail := _UNIT_TAIL.search(body)) and (unit := read_unit(_unwrapped(tail[0]))):
            return replace(_measure(body[: tail.start()], letters_are_units), unit=unit)
        has_words = any(_WORD.search(match["text"]) for match in _TEXT.finditer(body))
        body = _unwrapped(body)
    body = _without_lead(body if body.endswith("...") else body.rstrip(_CLOSING))
    if "base" in body:
        body = _IN_BASE.sub(r"\1_{\2}", body)
    if not (measured := _MEASURED.fullmatch(body)):
        return Canonical(None, body, None, has_words)
    amount, rest = measured["number"].rstrip(_CLOSING), measured["rest"]
    first, _, after = rest.partition(" ")
    number = read_number(_INNER_BLANK.sub("", amount))
    if number and (times := COUNTS.get(first.lower())) and not number.percent:
        unit = read_unit(after)
        if unit or not after:
            return Canonical(None, body, Number(number.value * times, False, 0), has_words, unit)
    else:
        glued = not letters_are_units and (not measured["blank"] or amount.endswith("\\pi"))
        unit = read_unit(rest, glued)
        if not unit and not glued and number and abs(number.value) == 1:
            unit = read_unit(rest + "s")
        if unit:
            return Canonical(None, amount, None, has_words, unit)
    return Canonical(None, body, None, has_words)


def _compound(body: str) -> Canonical:
    """`2 hours 30 minutes` is 2.5 hours; parts that do not add up leave the text unchanged."""
    parts = [(Fraction(amount), read_unit(name)) for amount, name in _COMPOUND_PART.findall(body)]
    units = [unit for _, unit in parts if unit]
    sizes = [unit.size for unit in units]
    kinds = {unit.powers for unit in units}
    if len(units) < len(parts) or len(kinds) > 1 or len(set(sizes)) < len(sizes):
        return Canonical(None, body, None, False)
    total = sum((amount * size for (amount, _), size in zip(parts, sizes, strict=True)), Fraction(0))
    return Canonical(None, body, Number(total / sizes[0], False, 0), False, units[0])


def _unwrapped(body: str) -> str:
    return " ".join(_TEXT.sub(r" \g<text> ", body).split())


def _in_ascii(text: str) -> str:
    """Rewrites digits, fractions, powers, Greek letters and signs of Unicode as ASCII or LaTeX."""
    text = _RAISED.sub(lambda raised: "^{" + unicodedata.normalize("NFKC", raised[0]) + "}", text)
    text = _LOWERED.sub(lambda low: "_{" + unicodedata.normalize("NFKC", low[0]) + "}", text)
    return "".join(character if character.isascii() else _character(character) for character in text)


def _character(character: str) -> str:
    if character in _UNICODE:
        return _UNICODE[character]
    if (digit := unicodedata.decimal(character, None)) is not None:
        return str(digit)
    kind = unicodedata.category(character)
    if kind == "Cf":  # without width
        return ""
    plain = unicodedata.normalize("NFKC", character)
    if kind == "No" and "\u2044" in plain:
        top, bottom = plain.split("\u2044")
        return rf"\frac{{{top}}}{{{bottom}}}"
    if unicodedata.name(character, "").startswith("GREEK SMALL LETTER ") and len(plain) == 1:
        name = unicodedata.name(character).split()[3].lower().replace("lamda", "lambda")
        return rf"\{name} "
    return "".join(_UNICODE.get(each, each) for each in plain)


def _money(found: re.Match[str]) -> str:
    sign = found["sign"].lower().removeprefix(r"\text{").removeprefix(r"\mathrm{").lstrip(" \\")
    return f"{found['minus']}{found['amount']}{found['times'] or ''} \\text{{{_MONEY_NAMES[sign[0]]}}}"


def _in_latex(text: str) -> str:
    """Rewrites bare names as LaTeX; most answers have none."""
    if roughly := _ROUGHLY.match(text):
        text = text[roughly.end() :]
    if "approx" in text:
        text = _ROUGHLY_AFTER.sub("", text)
    if "sqrt" in text:
        text = _ROOT_OF.sub(r"\\sqrt{\1}", _BARE_ROOT.sub(r"\\sqrt{\1}", text))
    if "pi" in text:
        text = _BARE_PI.sub(r"\\pi ", text)
    if "(" in text:
        text = _REPETEND.sub(r"\1\\overline{\2}", _BARE_FUNCTION.sub(r"\\\1 ", text))
    if "e" in text or "E" in text:
        text = _OTHER_NAMES.sub(
            lambda match: _ONE_NAME[match[0]], _POWER_OF_TEN.sub(r"\1\\times10^{\2}", text)
        )
    elif "**" in text or "ang" in text or "var" in text or "t" in text:
        text = _OTHER_NAMES.sub(lambda match: _ONE_NAME[match[0]], text)
    if "^" in text:
        text = _LETTER_TIMES.sub(r"\\times ", text)
    if "_" in text or "'" in text:
        text = _GROUPED.sub(lambda grouped: grouped[0].replace("_", "").replace("'", ""), text)
    return text


def _without_lead(text: str) -> str:
    """Drops `Therefore,`, `The answer is` or `Total:` before an answer."""
    if not (text[:1].isalpha() or text[:1] == "="):
        return text
    for opening in (_THEREFORE, _IS_ANSWER):
        if found := opening.match(text):
            text = text[found.end() :]
    if not (lead := _LEAD.match(text)):
        return text
    words = lead["words"].casefold().split()
    known = not lead["colon"] or words[-1] in _BEFORE_COLON
    return text[lead.end() :] if known and _NO_LEAD.isdisjoint(words) else text
