"""How fast a process of a machine works: a rate for each kind of cost, whose times add up.

Rates are calibrated on measured runs; `benchmarks/plan_error.py` tells how far off predictions of others are.
Nothing overlaps but what `hidden` says: this project's collectives wait for each other and for products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_parallel_r1.errors import UserError


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one process.

    Attributes:
        products: floating-point operations of matrix products, a multiply and an add counted as two.
        experts: the same, of products with the matrices of experts.
        attention: the same, of attention's two products.
        stream: bytes that pass between processor and memory beside those products.
        node: bytes sent to processes of the same node.
        net: bytes sent to other nodes.
        layers: layers gone through, forward or backward, each of which costs some time whatever its size.
        passes: layers gone through by a pass of decoding.
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
        return Cost(*(mine + others for mine, others in zip(self.amounts, other.amounts, strict=True)))

    def __mul__(self, times: float) -> Cost:
        return Cost(*(times * amount for amount in self.amounts))

    __rmul__ = __mul__

    @property
    def amounts(self) -> tuple[float, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


KINDS = tuple(field.name for field in fields(Cost))


def sent(amount: float, group: int, per_node: int) -> Cost:
    """Bytes between the processes of a group that takes `group` places side by side."""
    return Cost(node=amount) if group <= per_node else Cost(net=amount)


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates that one process (GPU) reaches.

    Attributes:
        per_node: processes of a node.
        products, experts, attention: floating-point operations a second, in the model's number format.
        fp8: how many times as fast products are in FP8.
        stream, node, net: bytes a second.
        hidden: share of the links' time that goes by behind other work.
        layer, decoding_layer, update: seconds that a layer, a layer of a decoding pass, and an optimizer step
            take whatever their size.
    """

    # For pydantic, which reads a machine from a file: an unknown key is an error.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    name: str
    per_node: int
    products: float
    experts: float
    attention: float
    stream: float
    node: float
    net: float
    fp8: float = 1.0
    hidden: float = 0.0
    layer: float = 0.0
    decoding_layer: float = 0.0
    update: float = 0.0

    def __post_init__(self) -> None:
        rates = ("per_node", "products", "experts", "attention", "stream", "node", "net", "fp8")
        broken = [f"{name} must be above 0" for name in rates if getattr(self, name) <= 0]
        if not 0 <= self.hidden <= 1:
            broken.append("hidden must be from 0 to 1")
        fixed = ("layer", "decoding_layer", "update")
        broken += [f"{name} must be 0 or more" for name in fixed if getattr(self, name) < 0]
        if broken:
            raise ValueError("; ".join(broken))

    def seconds(self, cost: Cost, fp8: bool = False) -> float:
        """That the cost takes; `fp8`: its products are in FP8."""
        each = self.seconds_each(fp8)
        return sum(amount * each[kind] for amount, kind in zip(cost.amounts, KINDS, strict=True))

    def seconds_each(self, fp8: bool = False) -> Mapping[str, float]:
        """Seconds of one unit of each kind of cost."""
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
# GB/s in each direction; a node of eight has eight network cards of 400 Gb/s. `products` is such that the
# published Llama 3 70B run of benchmarks/published_runs.py takes the time that it took, `experts` the same
# for Qwen3 235B-A22B. The shares of the peaks that attention (45 %), memory (80 %) and links (70 %) reach,
# and fixed times, are assumed.
H100 = Machine(
    name="H100",
    per_node=8,
    products=989e12 * 0.614,
    experts=989e12 * 0.114,
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
    """A machine that is known by name, or one in a YAML file with the fields of `Machine`.

    Raises:
        UserError: it is neither.
    """
    if name.lower() in MACHINES:
        return MACHINES[name.lower()]
    file = Path(name)
    if not file.is_file():
        raise UserError(f"machine {name}: neither known ({', '.join(MACHINES)}) nor a YAML file of its rates")
    try:
        return TypeAdapter(Machine).validate_python(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: no YAML ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the machine"
        wanted = ", ".join(field.name for field in fields(Machine))
        raise UserError(f"{file}: {where}: {first['msg']}; its fields are {wanted}") from None
