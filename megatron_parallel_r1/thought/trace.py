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
        versions: of the weights that drew each token; for a forced one, of those that the engine held then.
            Left out: 0 throughout.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    sampled: tuple[bool, ...]
    barred: tuple[bool, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    tree: Tree
    versions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.prompt, "a trace needs a prompt"
        lengths = {len(part) for part in (self.tokens, self.sampled, self.barred, self.logprobs)}
        assert lengths == {self.tree.length}, lengths
        assert len(self.versions) in (0, self.tree.length), len(self.versions)

    @property
    def sampled_count(self) -> int:
        return sum(self.sampled)

    @property
    def version(self) -> int:
        """Of the oldest weights that drew any of it; 0 where nothing was drawn."""
        drawn = (version for version, sampled in zip(self.versions, self.sampled, strict=False) if sampled)
        return min(drawn, default=0)
