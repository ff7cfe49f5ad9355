"""Frequencies of rotary positions, stretched as a config.json says; the model and the engine share them.

Imports torch where it computes: recipes are read, and jobs begun, without waiting for it.

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

# Beside `rope_type` and `factor`, what a kind reads, with the default of what may be left out.
KINDS: Mapping[str, Mapping[str, float | None]] = {
    "linear": {},
    "llama3": {"low_freq_factor": None, "high_freq_factor": None, "original_max_position_embeddings": None},
    "yarn": {"original_max_position_embeddings": None, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True},
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """A stretch of the rotary positions.

    Attributes:
        kind: one of `KINDS`.
        factor: by how much positions are stretched.
        values: the kind's further fields by name, in the order of `KINDS`.
    """

    kind: str
    factor: float
    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> RopeScaling | None:
        """From `rope_parameters` or `rope_scaling` of a config.json; None if nothing is stretched.

        Raises:
            UserError: a kind or a field that is not computed here, or one that is missing.
        """
        kind = told.get("rope_type", told.get("type", "default"))
        if kind == "default":
            return None
        if not isinstance(kind, str) or kind not in KINDS:
            raise UserError(
                f"config.json: rope_type = {kind!r} is not supported; use one of default, {', '.join(KINDS)}"
            )
        known = {"rope_type", "type", "rope_theta", "factor", *KINDS[kind]}
        for field, value in told.items():
            if field not in known and value is not None and (field, value) != ("partial_rotary_factor", 1.0):
                raise UserError(f"config.json: {field} = {value!r} of rope_type {kind!r} is not supported")
        given = {
            name: default if told.get(name) is None else told[name]
            for name, default in {"factor": None, **KINDS[kind]}.items()
        }
        for name, value in given.items():
            if value is None:
                raise UserError(f"config.json: rope_type {kind!r} needs {name}, which is missing")
            if not isinstance(value, (int, float)):
                raise UserError(f"config.json: {name} = {value!r} of rope_type {kind!r} is no number")
        factor, *values = (float(value) for value in given.values())
        return cls(kind, factor, tuple(values))

    def to_hf(self) -> dict[str, Any]:
        """The fields of `rope_parameters` but for rope_theta."""
        told: dict[str, Any] = {"rope_type": self.kind, "factor": self.factor}
        for name, value in zip(KINDS[self.kind], self.values, strict=True):
            is_count = name == "original_max_position_embeddings"
            told[name] = bool(value) if name == "truncate" else int(value) if is_count else value
        return told


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Angles per position, float32 [head_dim / 2], bit-equal to those of transformers.

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


def rope_gain(scaling: RopeScaling | None) -> float:
    """By which cosines and sines are multiplied: YaRN's temperature (arXiv 2309.00071, section 3.4)."""
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

    def dimension(turns: float) -> float:
        """That which turns so often over the original length."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(fast), dimension(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    ramp_r = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    kept_r = 1 - ramp_r
    return 1.0 / (factor * periods_r) * (1 - kept_r) + 1.0 / periods_r * kept_r
