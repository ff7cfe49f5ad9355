"""A trace: one sampled response, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from typing import Literal

from megatron_parallel_r1.thought.tree import Tree

Finish = Literal["eos", "length"]


@dataclass(frozen=True, slots=True)
class Outline:
    """What every rank knows of a trace: all but its tokens.

    Attributes:
        prompt_length: tokens of the prompt.
        sampled_count: response tokens that the policy sampled.
        finish, tree, version: as of `Trace`.
    """

    prompt_length: int
    sampled_count: int
    finish: Finish
    tree: Tree
    version: int

    @property
    def length(self) -> int:
        """Tokens of the response."""
        return self.tree.length


@dataclass(frozen=True, slots=True)
class Trace:
    """One response.

    Attributes:
        prompt: token ids of the prompt.
        tokens: token ids of the flat response, including forced tags.
        sampled: whether the policy sampled each token; only these carry loss.
        suppressed: whether `<Parallel>` was excluded from sampling: no further block was allowed, or none
            fitted. The token was sampled from the other tokens and is trained so: with the tag in the
            distribution, a wrong trace would raise its probability exactly where it cannot be sampled.
        logprobs: natural log-probability of each sampled token over the tokens that could be sampled, at the
            rollout's temperature, before top-k and top-p; 0.0 for forced tokens.
        finish: whether the policy or a limit ended the response.
        tree: the parse of `tokens`.
        versions: the weight version that sampled each token; for a forced token, the engine's version then.
            Empty: 0 throughout.
        experts: the experts that the engine chose for each token of the prompt and of the response, but
            perhaps the last one: int16, by token, layer and choice; in mode `replay` for each token of its
            row, which has branches (layout.py). Empty: not recorded.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    sampled: tuple[bool, ...]
    suppressed: tuple[bool, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    tree: Tree
    versions: tuple[int, ...] = ()
    experts: bytes = b""

    def __post_init__(self) -> None:
        assert self.prompt, "a trace needs a prompt"
        lengths = {len(part) for part in (self.tokens, self.sampled, self.suppressed, self.logprobs)}
        assert lengths == {self.tree.length}, lengths
        assert len(self.versions) in (0, self.tree.length), len(self.versions)

    @property
    def outline(self) -> Outline:
        return Outline(len(self.prompt), self.sampled_count, self.finish, self.tree, self.version)

    @property
    def sampled_count(self) -> int:
        return sum(self.sampled)

    @property
    def version(self) -> int:
        """The oldest version that sampled any token; 0 if none was sampled."""
        return min(compress(self.versions, self.sampled), default=0)
