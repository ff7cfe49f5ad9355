"""How a trace is decoded. The same settings serve training, evaluation and release."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_parallel_r1.thought.layout import Mode


@dataclass(frozen=True, slots=True)
class Thinking:
    """Settings of the parallel-thinking loop.

    Attributes:
        mode: how sibling paths see each other (thought/layout.py).
        paths: sibling paths of a block, 1..8; a request may ask for another number.
        max_blocks: blocks a trace may open on its main chain; then `<Parallel>` is suppressed and the trace
            goes on to its answer. A path may open as many, if `max_depth` lets it.
        max_depth: levels of nesting; 1 suppresses `<Parallel>` inside a path.
        max_path_tokens: tokens that a path may draw, its own `</Path>` included; a path that fills this is
            cut and `</Path>` is forced.
        max_response_tokens: all tokens of the flat response, forced ones included.
        max_critical_tokens: tokens on the critical path (of a block only the longest path counts); None: as
            many as `max_response_tokens`.
        reserve_tokens: kept free behind each block for its summary and the answer.
        temperature, top_p, top_k: of sampling; temperature 0 is greedy.
    """

    # For pydantic, which reads these settings from a recipe: an unknown key is an error.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    mode: Mode = "isolated"
    paths: int = 2
    max_blocks: int = 4
    max_depth: int = 1
    max_path_tokens: int = 1024
    max_response_tokens: int = 3000
    max_critical_tokens: int | None = None
    reserve_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        checks = {
            "paths must be 1..8": 1 <= self.paths <= 8,
            "max_blocks must be >= 0": self.max_blocks >= 0,
            "max_depth must be >= 1": self.max_depth >= 1,
            "max_path_tokens must be >= 1": self.max_path_tokens >= 1,
            "max_response_tokens must be >= 1": self.max_response_tokens >= 1,
            "max_critical_tokens must be >= 1": (self.max_critical_tokens or 1) >= 1,
            "reserve_tokens must be >= 0": self.reserve_tokens >= 0,
            "temperature must be >= 0": self.temperature >= 0,
            "top_p must be in (0, 1]": 0 < self.top_p <= 1,
            "top_k must be >= 0": self.top_k >= 0,
        }
        broken = [what for what, holds in checks.items() if not holds]
        if broken:
            raise ValueError("; ".join(broken))
