"""Amounts of work, in the units that a machine has rates for; they add up and scale."""

from __future__ import annotations

from dataclasses import dataclass, fields


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
