"""Amounts of work, and a machine's rate for each kind of it; the times add up.

Rates are calibrated on measured runs; `benchmarks/plan_error.py` measures the prediction error for others.
Only the share `hidden` overlaps: this project's collectives wait for each other and for matrix products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import yaml
from pydantic import Field

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.settings import Count, Settings, Share


@dataclass(frozen=True, slots=True)
class Cost:
    """The work of one rank.

    Attributes:
        products: floating-point operations of matrix products; a multiply and an add count as two.
        experts: the same, for the matrices of experts.
        attention: the same, for attention's two products.
        stream: bytes between processor and memory beside those products.
        node: bytes sent within a node.
        net: bytes sent to other nodes.
        layers: layers computed, forward or backward, each of which takes a fixed time.
        passes: layers computed in decoding passes.
        updates: optimizer steps.
    """

    products: float = 0.0
    experts: float = 0.0
    attention: float = 0.0
    stream: float = 0.0
    node: float = 0.0
    net: float = 0.0
    layers: float = 0.0
    passes: float = 0.0
    updates: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self.amounts, other.amounts, strict=True)))

    def __mul__(self, times: float) -> Cost:
        return Cost(*(times * amount for amount in self.amounts))

    __rmul__ = __mul__

    @property
    def amounts(self) -> tuple[float, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


KINDS = tuple(field.name for field in fields(Cost))


def sent(amount: float, group: int, per_node: int) -> Cost:
    """Returns the cost of bytes sent within a group that spans `group` consecutive ranks."""
    return Cost(node=amount) if group <= per_node else Cost(net=amount)


Rate = Annotated[float, Field(gt=0)]
FixedSeconds = Annotated[float, Field(ge=0)]


class Machine(Settings):
    """Rates of one rank (GPU): the units of `Cost` a second, in the model's dtype, and fixed times."""

    name: str
    per_node: Count
    """Ranks of a node."""
    products: Rate
    experts: Rate
    attention: Rate
    stream: Rate
    node: Rate
    net: Rate
    fp8: Rate = 1.0
    """Speed-up of products in FP8."""
    hidden: Share = 0.0
    """Share of communication time that overlaps with other work."""
    layer: FixedSeconds = 0.0
    """Of a layer, forward or backward."""
    decoding_layer: FixedSeconds = 0.0
    """Of a layer in a decoding pass."""
    update: FixedSeconds = 0.0
    """Of an optimizer step."""

    def seconds(self, cost: Cost, fp8: bool = False) -> float:
        """Returns the time of a cost; `fp8`: with its products in FP8."""
        each = self.seconds_each(fp8)
        return sum(amount * each[kind] for amount, kind in zip(cost.amounts, KINDS, strict=True))

    def seconds_each(self, fp8: bool = False) -> Mapping[str, float]:
        """Returns the seconds per unit of each kind of cost."""
        faster = self.fp8 if fp8 else 1.0
        return {
            "products": 1 / (faster * self.products),
            "experts": 1 / (faster * self.experts),
            "attention": 1 / self.attention,
            "stream": 1 / self.stream,
            "node": (1 - self.hidden) / self.node,
            "net": (1 - self.hidden) / self.net,
            "layers": self.layer,
            "passes": self.decoding_layer,
            "updates": self.update,
        }


# Data sheet of the H100 SXM: 989 TFLOP/s in bfloat16 and 1,979 in FP8, dense, 3.35 TB/s of memory, NVLink 450
# GB/s in each direction; a node of eight has eight network cards of 400 Gb/s. `products` is calibrated on the
# published Llama 3 70B run of benchmarks/published_runs.py, `experts` on Qwen3 235B-A22B. The shares of the
# peaks that attention (45 %), memory (80 %) and links (70 %) reach, and the fixed times, are assumed.
H100 = Machine(
    name="H100",
    per_node=8,
    products=989e12 * 0.614,
    experts=989e12 * 0.108,
    attention=989e12 * 0.45,
    stream=3.35e12 * 0.8,
    node=450e9 * 0.7,
    net=50e9 * 0.7,
    fp8=2.0,
    layer=30e-6,
    decoding_layer=15e-6,
    update=20e-3,
)
MACHINES: Mapping[str, Machine] = MappingProxyType({"h100": H100})


def read_machine(name: str) -> Machine:
    """Returns a built-in machine, or reads one from a YAML file with the fields of `Machine`.

    Raises:
        UserError: there is no such machine or file, or the file is malformed.
    """
    if name.lower() in MACHINES:
        return MACHINES[name.lower()]
    file = Path(name)
    if not file.is_file():
        raise UserError(f"machine {name}: not built in ({', '.join(MACHINES)}) and no YAML file of its rates")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} is not valid YAML ({' '.join(str(error).split())})") from None
    return Machine.read(values, str(file))
