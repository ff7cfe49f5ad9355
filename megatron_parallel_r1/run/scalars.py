"""The names of a record's numbers in TensorBoard and Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOT_SCALARS = ("step", "steps", "problems", "samples")
EVALUATION = "evaluation"


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, as `<kind>/<metric>`, of an evaluation `evaluation/<set>/<mode>/<metric>`."""
    parts = [record["kind"]]
    if record["kind"] == EVALUATION:
        parts += [record["set"], record["mode"]]
    return {
        "/".join([*parts, name]): value
        for name, value in record.items()
        if name not in NOT_SCALARS and isinstance(value, bool | int | float)
    }
