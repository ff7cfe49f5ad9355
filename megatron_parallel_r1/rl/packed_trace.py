"""Traces as columns of bytes, which ranks exchange; a rank unpacks only the traces that it judges or writes.

A token takes 18 bytes here, and some 100 as Python objects. A rank that unpickled and laid out the traces of
all others would gain nothing from more ranks (`python -m benchmarks.trace_exchange`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_parallel_r1.thought.trace import Outline, Trace

# Per-token values of a trace, and their dtypes.
COLUMNS = {"tokens": "<i4", "sampled": "|b1", "suppressed": "|b1", "logprobs": "<f8", "versions": "<i4"}
PROMPT = np.dtype("<i4")


@dataclass(frozen=True, slots=True)
class PackedTrace:
    """A trace whose tokens and their values are bytes.

    Attributes:
        columns: the prompt's token ids, then each of COLUMNS; `versions` may be missing.
        recorded: whether the trace has experts.
        experts: as of `Trace`; empty on ranks that do not hold them (expert_exchange.py).
    """

    outline: Outline
    columns: bytes
    recorded: bool = False
    experts: bytes = b""

    @classmethod
    def of(cls, trace: Trace) -> PackedTrace:
        values = [np.asarray(getattr(trace, name), kind) for name, kind in COLUMNS.items()]
        columns = [np.asarray(trace.prompt, PROMPT), *values]
        whole = b"".join(column.tobytes() for column in columns)
        return cls(trace.outline, whole, bool(trace.experts), trace.experts)

    @property
    def without_experts(self) -> PackedTrace:
        """As ranks that do not hold its experts have it."""
        return replace(self, experts=b"")

    @property
    def prompt(self) -> NDArray[np.int32]:
        return np.frombuffer(self.columns, PROMPT, self.outline.prompt_length)

    def column(self, name: str) -> NDArray:
        """The values of one of COLUMNS, one per response token."""
        start, length = PROMPT.itemsize * self.outline.prompt_length, self.outline.length
        for other, kind in COLUMNS.items():
            if other == name:
                there = length if start < len(self.columns) else 0
                return np.frombuffer(self.columns, kind, there, start)
            start += np.dtype(kind).itemsize * length
        raise KeyError(name)

    def unpack(self) -> Trace:
        """Returns the trace, equal to the packed one."""
        tokens, sampled, suppressed, logprobs, versions = (
            tuple(self.column(name).tolist()) for name in COLUMNS
        )
        return Trace(
            prompt=tuple(self.prompt.tolist()),
            tokens=tokens,
            sampled=sampled,
            suppressed=suppressed,
            logprobs=logprobs,
            finish=self.outline.finish,
            tree=self.outline.tree,
            versions=versions,
            experts=self.experts,
        )
