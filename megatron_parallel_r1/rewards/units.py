r"""Units: `35\text{ cm}` is `0.35 m` and not `35 m`; nouns are units that convert to nothing else."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

_TABLE = """
m: 1 m meter metre, 1000 km kilometer kilometre
m: 1/100 cm centimeter centimetre, 1/1000 mm millimeter millimetre
m: 0.0254 in inch inche, 0.3048 ft foot feet, 0.9144 yd yard, 1609.344 mi mile
m m: 4046.8564224 acre
m m m: 1/1000 l liter litre, 1/1000000 ml milliliter millilitre cc, 0.003785411784 gal gallon
g: 1 g gram gm, 1000 kg kilogram kilo, 1/1000 mg milligram, 1000000 tonne
g: 28.349523125 oz ounce, 453.59237 lb pound gbp quid
s: 1 s sec second, 60 min minute, 3600 h hr hour, 86400 day, 604800 wk week
month: 1 month, 12 year yr
m /s: 0.44704 mph, 5/18 kph kmh
g m /s /s: 1000 n newton
g m m /s /s: 1000 j joule, 1000000 kj kilojoule
g m m /s /s /s: 1000 w watt, 1000000 kw kilowatt
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
volt: 1 v volt
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
above add almost am and apart as base bases below besides beyond bn but cannot choose cos cot could couple
couples crore crores csc cube cubed cubes difference differences digit digits double doubles either equal
equals except excluding exp factor factorial factorials factors false fewer fold greater gross guess halved
if incorrect inf infinity inverse inverses is isn it k lakh lakhs least less ln log logs maybe might mil
minus mod modulo more most multiple multiples multiplied nearly negative negatives neither never no nor not
off only opposite opposites or over pair pairs percent perhaps pi plus pm possibly power powers probably
product products quadruple quotient quotients reciprocal reciprocals remainder remainders root roots score
scores short shy sin sqrt squared sum sums tan than thus times to triple triples twice under unless unlike
unlikely was were when where with without wrong wrongly x yes zero zeroes zeros
"""
CHANGES = frozenset(_CHANGES_TEXT.split())
"""Words that change what stands beside them: a number with such a word is another number, or none."""

_PER = re.compile(r"/|(?<![a-z])per(?![a-z])")
_FACTOR = re.compile(
    r"(?:(?P<before>square|sq|cubic|cu) )?(?P<name>[A-Za-z]+(?:[ -][A-Za-z]+)*?)"
    r"(?: ?(?P<after>squared|cubed)| ?\^ ?\{?(?P<digit>-?[1-9])\}?)?"
)
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_PLURAL = re.compile(r"[a-z ]{2,}[^suiS ]s")
_SHARE = re.compile(r"[enfdxh]ths?$")
_LETTERS = "mgshlLNJWV"
_CUT = frozenset(
    {"altogether", "at", "each", "for", "from", "in", "left", "long", "of", "on", "remaining", "total"}
)
_FILLERS = frozenset({"a", "an", "the", "us", "all"})
_PLURALS = frozenset(
    {"children", "dice", "fish", "geese", "men", "mice", "people", "sheep", "teeth", "women"}
)


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit: its size in base units, and the powers of these, sorted by name."""

    size: Fraction
    powers: tuple[tuple[str, int], ...]


def read_unit(text: str) -> Unit | None:
    r"""Reads `cm`, `km/h`, `square feet`, `m^2`, `miles per hour`, `red apples`; None for other words."""
    size, powers = Fraction(1), Counter[str]()
    if text.replace(".", "").lower() in CHANGES:
        return None
    for place, phrase in enumerate(_PER.split(" ".join(text.replace(".", " ").split()))):
        for written in phrase.split("*"):
            factor = _FACTOR.fullmatch(written.strip())
            unit = _named(factor["name"], place > 0) if factor else None
            if not factor or not unit:
                return None
            power = _POWERS.get(factor["before"] or factor["after"]) or int(factor["digit"] or 1)
            power *= -1 if place else 1
            size *= unit.size**power
            for name, times in unit.powers:
                powers[name] += times * power
    return Unit(size, tuple(sorted((name, power) for name, power in powers.items() if power)))


def _named(name: str, any_noun: bool) -> Unit | None:
    """Returns the unit of a name; nouns that are no unit of measure must be plural unless `any_noun`."""
    words = name.lower().replace("-", " ").split()
    if not CHANGES.isdisjoint(words) or not COUNTS.keys().isdisjoint(words):
        return None
    words = [word for word in words if word not in _FILLERS]
    if cut := next((place for place, word in enumerate(words) if place and word in _CUT), 0):
        words = words[:cut]
    if len(words) != 1 or len(name) > 1 or name in _LETTERS:
        noun = " ".join(words)
        known = _UNITS.get(noun) or _UNITS.get(noun.removesuffix("s"))
        if known or not words:
            return known
        if _SHARE.search(noun):
            return None
        if any_noun or words[-1] in _PLURALS or _PLURAL.fullmatch(noun):
            return Unit(Fraction(1), ((noun.removesuffix("s"), 1),))
    return None


def _units() -> dict[str, Unit]:
    units: dict[str, Unit] = {}
    for line in _TABLE.split("\n")[1:-1]:
        bases, listed = line.split(": ")
        powers = Counter[str]()
        for base in bases.split():
            powers[base.strip("/")] += -1 if base[0] == "/" else 1
        for size, *names in map(str.split, listed.split(", ")):
            units |= dict.fromkeys(names, Unit(Fraction(size), tuple(sorted(powers.items()))))
    return units


_UNITS = _units()
