"""A trace: one response as it was rolled out, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_parallel_r1.thought.tree import Tree

Finish = Literal["eos", "length"]


@dataclass(frozen=True, slots=True)
class Trace:
    """One response.

    Attributes:
        prompt: token ids of the prompt.
        tokens: token ids of the flat response, forced tags included.
        sampled: which of `tokens` the policy drew; only these carry loss.
        logprobs: natural log-probability of each sampled token under the policy at the rollout's
            temperature, before top-k, top-p and suppression; 0.0 for forced tokens.
        finish: the policy ended it, or a limit did.
        tree: the parse of `tokens`.
        version: of the weights that drew it.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    sampled: tuple[bool, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    tree: Tree
    version: int = 0

    def __post_init__(self) -> None:
        assert self.prompt, "a trace needs a prompt"
        assert len(self.tokens) == len(self.sampled) == len(self.logprobs) == self.tree.length

    @property
    def sampled_count(self) -> int:
        return sum(self.sampled)
