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
        barred: whether `<Parallel>` could not be drawn there: no further block was allowed, or none fitted.
            Such a token was drawn from the others, and is trained so: held against a distribution that has
            the tag, a wrong trace would raise the tag's probability just where it cannot be drawn.
        logprobs: natural log-probability of each sampled token among those that could be drawn, at the
            rollout's temperature and before top-k and top-p; 0.0 for forced tokens.
        finish: the policy ended it, or a limit did.
        tree: the parse of `tokens`.
        version: of the weights that drew it.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    sampled: tuple[bool, ...]
    barred: tuple[bool, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    tree: Tree
    version: int = 0

    def __post_init__(self) -> None:
        assert self.prompt, "a trace needs a prompt"
        lengths = {len(part) for part in (self.tokens, self.sampled, self.barred, self.logprobs)}
        assert lengths == {self.tree.length}, lengths

    @property
    def sampled_count(self) -> int:
        return sum(self.sampled)
