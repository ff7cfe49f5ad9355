"""Numbers as people read them; None becomes a dash."""

from __future__ import annotations

NONE = "–"


def percent(share: float | None, digits: int = 1) -> str:
    """0.613 -> `61.3 %`."""
    return NONE if share is None else f"{100 * share:.{digits}f} %"


def interval(value: float, low: float, high: float, signed: bool = False) -> str:
    """A share with its interval, in percent: `61.3 [58.9, 63.6]`; `signed` is for differences."""
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def number(value: float | None) -> str:
    """Three significant digits with thousands separators: `0.0213`, `2.41`, `1,240`, `3.2e-6`."""
    if value is None:
        return NONE
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e7):
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def fixed(value: float | None, digits: int) -> str:
    """A fixed number of decimals, for the numbers of one column: `61.0`."""
    return NONE if value is None else f"{value:,.{digits}f}"


def count(value: int) -> str:
    """Large counts in short: `980`, `2.3 M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{value:,}"


def duration(seconds: float | None) -> str:
    """`12 s`, `4 min 05 s`, `3 h 20 min`."""
    if seconds is None:
        return NONE
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
