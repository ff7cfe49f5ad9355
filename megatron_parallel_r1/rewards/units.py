r"""Units: `35\text{ cm}` is `0.35 m` and not `35 m`; nouns are units that convert to nothing else."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from megatron_parallel_r1.utils.latex import HEDGES

_TABLE = """
m: 1 m meter metre, 1000 km kilometer kilometre
m: 1/100 cm centimeter centimetre, 1/1000 mm millimeter millimetre
m: 0.0254 in inch inche, 0.3048 ft foot feet, 0.9144 yd yard, 1609.344 mi mile
m m: 4046.8564224 acre
m m m: 1/1000 l L liter litre, 1/1000000 ml milliliter millilitre cc, 0.003785411784 gal gallon
g: 1 g gram gm, 1000 kg kilogram kilo, 1/1000 mg milligram, 1000000 tonne
g: 28.349523125 oz ounce, 453.59237 lb pound gbp quid
s: 1 s sec second, 60 min minute, 3600 h hr hour, 86400 day, 604800 wk week
month: 1 month, 12 year yr
m /s: 0.44704 mph, 5/18 kph kmh
g m /s /s: 1000 N newton
g m m /s /s: 1000 J joule, 1000000 kj kilojoule
g m m /s /s /s: 1000 W watt, 1000000 kw kilowatt
/s: 1 hz hertz
usd: 1 dollar usd buck, 1/100 cent
eur: 1 euro eur
yen: 1 yen jpy
yuan: 1 yuan rmb cny
rupee: 1 rupee inr
degree: 1 degree deg
radian: 1 radian rad
celsius: 1 celsius
fahrenheit: 1 fahrenheit
volt: 1 V volt
unit: 1 unit
"""
_COUNTS = """
10 ten, 12 dozen, 100 hundred, 1000 thousand, 1000000 million, 1000000000 billion, 1000000000000 trillion,
1/2 half, 1/3 third, 1/4 quarter, 1/4 fourth, 1/5 fifth, 1/6 sixth, 1/7 seventh, 1/8 eighth, 1/9 ninth,
1/10 tenth, 1/100 hundredth, 1/1000 thousandth, 1/1000000 millionth, 1/2 halve
"""
COUNTS = {
    name + ending: Fraction(size) for size, name in map(str.split, _COUNTS.split(",")) for ending in ("", "s")
}
"""Words after a number that multiply it."""

_CHANGES_TEXT = """
above add almost am and apart as base below besides beyond bn but cannot choose cos cot could couple crore
csc cube cubed difference digit double either equal except excluding exp factor factorial false fewer fold
greater gross grosses guess halved if incorrect inf infinity inverse is isn it k lakh least less ln log mil
minus mod modulo more most multiple multiplied myriad nearly negative neither never no nor not off once only
opposite over pair percent pi plus pm power product quadruple quotient reciprocal remainder root score short
shy sin sqrt squared sum tan than thrice thus times to triple twice under unless unlike unlikely was were
when where with without wrong wrongly x yes zero zeroes
"""
_ONES = "one two three four five six seven eight nine eleven twelve"
_TEENS = "thir four fif six seven eigh nine"
_TENS = "twent thirt fort fift sixt sevent eight ninet"
_NUMERALS = {
    stem + end
    for stems, ends in ((_ONES, ("", "s", "es")), (_TEENS, ("teen", "teens")), (_TENS, ("y", "ies")))
    for stem in stems.split()
    for end in ends
}
_CHANGES = set(_CHANGES_TEXT.split())
CHANGES = HEDGES | _NUMERALS | _CHANGES | {word + "s" for word in _CHANGES if len(word) > 2}
"""Words that change what stands beside them: a number with such a word is another number, or none."""

_PER = re.compile(r"/|(?<![a-z])per(?![a-z])")
_FACTOR = re.compile(
    r"(?:(?P<before>square|sq|cubic|cu) )?(?P<name>[A-Za-z]+(?:[ -][A-Za-z]+)*?)"
    r"(?: ?(?P<after>squared|cubed)| ?\^ ?\{?(?P<digit>-?[1-9])\}?)?"
)
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_PLURAL = re.compile(r"[a-z ]{2,}[^suiS ]s")
_SHARE = re.compile(r"(?:[enfdxh]th|illion)s?$")
_PRODUCTS = frozenset({"gm", "hr", "lb"})  # rather letters than a unit, without a blank before
_CUT = frozenset(
    {"altogether", "at", "each", "for", "from", "in", "left", "long", "of", "on", "remaining", "total"}
)
_FILLERS = frozenset({"a", "an", "the", "us", "all"})
_PLURALS = frozenset(
    {"children", "dice", "fish", "geese", "men", "mice", "people", "sheep", "teeth", "women"}
)


@dataclass(frozen=True, slots=True)
class PhysicalUnit:
    """A unit: its size in base units, and the powers of these, sorted by name."""

    size: Fraction
    powers: tuple[tuple[str, int], ...]


def read_unit(text: str, glued: bool = False) -> PhysicalUnit | None:
    r"""Reads `cm`, `km/h`, `square feet`, `m^2`, `miles per hour`, `red apples`; None for other words.

    Args:
        glued: no blank separates the text from its number. Letters are then variables (`4m^2`, `2h/g`), and
            only names of units of at least two letters count, without powers.
    """
    size, powers = Fraction(1), Counter[str]()
    if text.replace(".", "").lower() in CHANGES:
        return None
    for place, phrase in enumerate(_PER.split(" ".join(text.replace(".", " ").split()))):
        for written in phrase.split("*"):
            factor = _FACTOR.fullmatch(written.strip())
            unit = _named(factor["name"], place > 0) if factor else None
            if not factor or not unit or (glued and not _is_sure(factor)):
                return None
            power = _POWERS.get(factor["before"] or factor["after"]) or int(factor["digit"] or 1)
            power *= -1 if place else 1
            size *= unit.size**power
            for name, times in unit.powers:
                powers[name] += times * power
    return PhysicalUnit(size, tuple(sorted((name, power) for name, power in powers.items() if power)))


def _is_sure(factor: re.Match[str]) -> bool:
    name = factor["name"]
    power = factor["before"] or factor["after"] or factor["digit"]
    return len(name) > 1 and not power and name not in _PRODUCTS and _known(name) is not None


def _known(name: str) -> PhysicalUnit | None:
    """Returns a unit of measure; symbols of one letter and `m`, no mega, before another keep their case."""
    for noun in (name, name.removesuffix("s") if len(name) > 2 else name):
        has_case = len(noun) == 1 or (len(noun) == 2 and noun[0] == "M")
        if unit := _UNITS.get(noun if has_case else noun.lower()):
            return unit
    return None


def _named(name: str, any_noun: bool) -> PhysicalUnit | None:
    """Returns the unit of a name; nouns that are no unit of measure must be plural unless `any_noun`."""
    written = name.replace("-", " ").split()
    words = [word.lower() for word in written]
    if not CHANGES.isdisjoint(words) or not COUNTS.keys().isdisjoint(words):
        return None
    written = [word for word in written if word.lower() not in _FILLERS]
    if cut := next((place for place, word in enumerate(written) if place and word.lower() in _CUT), 0):
        written = written[:cut]
    if known := _known(" ".join(written)):
        return known
    noun = " ".join(written).lower()
    if len(noun) <= 2 or _SHARE.search(noun):
        return None
    if any_noun or noun.split()[-1] in _PLURALS or _PLURAL.fullmatch(noun):
        return PhysicalUnit(Fraction(1), ((noun.removesuffix("s"), 1),))
    return None


def _units() -> dict[str, PhysicalUnit]:
    units: dict[str, PhysicalUnit] = {}
    for line in _TABLE.split("\n")[1:-1]:
        bases, listed = line.split(": ")
        powers = Counter[str]()
        for base in bases.split():
            powers[base.strip("/")] += -1 if base[0] == "/" else 1
        for size, *names in map(str.split, listed.split(", ")):
            units |= dict.fromkeys(names, PhysicalUnit(Fraction(size), tuple(sorted(powers.items()))))
    return units


_UNITS = _units()
