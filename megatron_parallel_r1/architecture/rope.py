"""Rotary frequencies, scaled as a config.json says; shared by the model and the native engine.

torch is imported where it computes, so that a recipe is read without it. transformers' ROPE_INIT_FUNCTIONS
are not used: they need a PreTrainedConfig, have no default kind, and may change with its version.

Shapes: r pairs of dimensions of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# The fields of each kind beside `rope_type` and `factor`, with the default of optional ones.
KINDS: Mapping[str, Mapping[str, float | None]] = {
    "linear": {},
    "llama3": {"low_freq_factor": None, "high_freq_factor": None, "original_max_position_embeddings": None},
    "yarn": {"original_max_position_embeddings": None, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True},
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """A scaling of the rotary positions.

    Attributes:
        kind: one of `KINDS`.
        factor: the ratio of new to original context length.
        values: the kind's further fields, in the order of `KINDS`.
    """

    kind: str
    factor: float
    values: tuple[float, ...] = ()

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any]) -> RopeScaling | None:
        """Reads `rope_parameters` or `rope_scaling` of a config.json; None if nothing is scaled.

        Raises:
            UserError: a kind or a field is not supported, or one is missing.
        """
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        if not isinstance(kind, str) or kind not in KINDS:
            raise UserError(
                f"config.json: rope_type = {kind!r} is not supported; use one of default, {', '.join(KINDS)}"
            )
        known = {"rope_type", "type", "rope_theta", "factor", *KINDS[kind]}
        for field, value in rope.items():
            if field not in known and value is not None and (field, value) != ("partial_rotary_factor", 1.0):
                raise UserError(f"config.json: {field} = {value!r} of rope_type {kind!r} is not supported")
        values: dict[str, Any] = {
            name: default if rope.get(name) is None else rope[name]
            for name, default in {"factor": None, **KINDS[kind]}.items()
        }
        for name, value in values.items():
            if value is None:
                raise UserError(f"config.json: rope_type {kind!r} needs {name}, which is missing")
            if not isinstance(value, (int, float)):
                raise UserError(f"config.json: {name} = {value!r} of rope_type {kind!r} is not a number")
        factor, *others = (float(value) for value in values.values())
        return cls(kind, factor, tuple(others))

    def to_hf(self) -> dict[str, Any]:
        """Returns the fields of `rope_parameters` except rope_theta."""
        rope: dict[str, Any] = {"rope_type": self.kind, "factor": self.factor}
        for name, value in zip(KINDS[self.kind], self.values, strict=True):
            is_count = name == "original_max_position_embeddings"
            rope[name] = bool(value) if name == "truncate" else int(value) if is_count else value
        return rope


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Returns the angle per position of each pair, float32 [head_dim / 2], bit-equal to transformers'.

    RoPE: arXiv 2104.09864; linear: 2306.15595; YaRN: 2309.00071; llama3: the Llama 3.1 release.
    """
    import torch

    exponents_r = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies_r = 1.0 / theta**exponents_r
    if scaling is None:
        return frequencies_r
    if scaling.kind == "linear":
        return frequencies_r / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies_r, scaling.factor, *scaling.values)
    return _yarn(theta**exponents_r, head_dim, theta, scaling.factor, *scaling.values)


def rope_attention_factor(scaling: RopeScaling | None) -> float:
    """Returns the factor of cosines and sines: YaRN's temperature (arXiv 2309.00071, section 3.4)."""
    if scaling is None or scaling.kind != "yarn" or scaling.factor <= 1:
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1.0


def _llama3(frequencies_r: Tensor, factor: float, low: float, high: float, original: float) -> Tensor:
    import torch

    waves_r = 2 * math.pi / frequencies_r
    scaled_r = torch.where(waves_r > original / low, frequencies_r / factor, frequencies_r)
    smooth_r = (original / waves_r - low) / (high - low)
    between_r = (1 - smooth_r) * scaled_r / factor + smooth_r * scaled_r
    is_between_r = ~(waves_r < original / high) * ~(waves_r > original / low)
    return torch.where(is_between_r, between_r, scaled_r)


def _yarn(
    periods_r: Tensor,
    head_dim: int,
    theta: float,
    factor: float,
    original: float,
    fast: float,
    slow: float,
    truncate: float,
) -> Tensor:
    import torch

    def dimension(rotations: float) -> float:
        """Returns the dimension that rotates this often over the original length."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(fast), dimension(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    ramp_r = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    kept_r = 1 - ramp_r
    return 1.0 / (factor * periods_r) * (1 - kept_r) + 1.0 / periods_r * kept_r
