"""Prometheus' text format 0.0.4."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def metric_lines(
    name: str, kind: Literal["gauge", "counter"], samples: Iterable[tuple[Mapping[str, str], float]]
) -> Iterator[str]:
    """Yields the lines of one metric.

    Args:
        samples: values by their labels; {} for none.
    """
    yield f"# TYPE {name} {kind}\n"
    for labels, value in samples:
        shown = ",".join(f'{label}="{text.translate(_ESCAPES)}"' for label, text in labels.items())
        yield f"{name}{{{shown}}} {float(value)}\n" if shown else f"{name} {float(value)}\n"
