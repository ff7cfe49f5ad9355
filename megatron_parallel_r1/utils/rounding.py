"""How far two sound computations of the same log-probs may be apart.

A log-prob is the end of a chain of roundings. Each layer adds two products to the residual stream,
attention's and the MLP's; with the embedding and the head that makes 2 L + 2 rounded terms. Independent
errors add up as the root of their number (Higham, "Accuracy and Stability of Numerical Algorithms", 2002,
section 2.8), and each is relative to the size of what it rounds. So differences are counted in units of

    u * sqrt(2 L + 2) * s

with the unit roundoff u of the coarser dtype of the two, L layers, and s the largest |log-prob|. Uniformly
drawn tokens have a mean |log-prob| of ln V or more (Jensen), and s grows with the logits and with
1 / temperature, so the log-probs themselves are the only measure that it takes.

`benchmarks/rounding.py` measured, in these units (docs/rollout.md has the table): 1.7 at most and 0.24 on
average in bfloat16, 1.9 at most in float32. The limits are 8 for the largest difference and, in 16 bits, 0.5
for the mean: there the largest says little, and the mean still tells a wrong matrix from rounding. In
float32 a relative error of 1e-3 in one matrix of 36 layers makes 38 units; the mean has no limit of its own,
because one rounded sum over a large vocabulary shifts all log-probs of a position alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float8_e4m3fn": 2.0**-4}
LARGEST_UNITS, MEAN_UNITS = 8.0, 0.5
# Least limit: float32, logits of some units, a few hundred roundings of 6e-8.
EXACT = 2e-5


@dataclass(frozen=True, slots=True)
class RoundingLimits:
    """Most that differences may be, in nats: the largest of them, and their mean."""

    largest: float
    mean: float


def rounding_limits(dtypes: Iterable[str | None], layers: int, scale: float) -> RoundingLimits:
    """The differences that rounding explains.

    Args:
        dtypes: of both computations, such as `bfloat16`; one without a known roundoff does not count.
        layers: of the whole model.
        scale: largest |log-prob| in nats, or largest |logit| if logits are compared.
    """
    float32 = ROUNDOFF["float32"]
    roundoff = max((ROUNDOFF[dtype] for dtype in dtypes if dtype in ROUNDOFF), default=float32)
    unit = roundoff * (2 * layers + 2) ** 0.5 * scale
    largest = max(EXACT, LARGEST_UNITS * unit)
    return RoundingLimits(largest, largest if roundoff <= float32 else MEAN_UNITS * unit)
