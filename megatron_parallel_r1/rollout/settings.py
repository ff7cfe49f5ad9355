"""Decoding settings of a trace; the same ones serve training, evaluation and release."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from megatron_parallel_r1.thought.format_settings import FormatSetting, format_of
from megatron_parallel_r1.thought.layout import Mode
from megatron_parallel_r1.utils.settings import Count, CountOrZero, Settings, Tokens, TokensOrZero


class Thinking(Settings):
    """Settings of the parallel-thinking loop."""

    format: FormatSetting = "parallel_r1"
    """Format of parallel thinking (docs/formats.md): a name, or a mapping with one of your own; one for a
    run."""
    mode: Mode = "isolated"
    """How sibling paths see each other (`thought/layout.py`)."""
    paths: Annotated[int, Field(ge=1, le=8)] = 2
    """Sibling paths of a block; a request may set another number. A format with plans reads it from them."""
    max_blocks: CountOrZero = 4
    """Blocks that a trace may open on its main chain, and that a path may open where `max_depth` allows it.
    At the limit `<Parallel>` is suppressed and the trace continues to its answer."""
    max_depth: Count = 1
    """Levels of nesting; 1 suppresses `<Parallel>` inside a path."""
    max_path_tokens: Tokens = 1024
    """Tokens sampled in a path, its `</Path>` included; a path that reaches this limit is cut and `</Path>`
    is forced."""
    max_response_tokens: Tokens = 3000
    """Tokens of the flat response, forced ones included."""
    max_critical_tokens: Tokens | None = None
    """Tokens on the critical path (only the longest path of a block counts); null: as
    `max_response_tokens`."""
    reserve_tokens: TokensOrZero = 0
    """Tokens kept free after each block for its summary and the answer."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: the smallest set of tokens with this probability; 1 in RL, which trains the whole
    distribution."""
    top_k: CountOrZero = 0
    """Sample from the most likely tokens only; 0: from all, as RL needs."""

    @property
    def most_paths(self) -> int:
        """The most sibling paths that a block can have."""
        known = format_of(self.format)
        return self.paths if known.plan is None else known.max_paths

    @model_serializer(mode="wrap")
    def _without_default_format(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out the format where it is Parallel-R1, as records had none before there were others."""
        fields: dict[str, Any] = dump(self)
        if self.format == "parallel_r1":
            fields.pop("format", None)
        return fields
