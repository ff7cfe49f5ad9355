"""How long rows can get, from the limits that a recipe sets."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_parallel_r1.rollout.settings import Thinking

# Around what a path draws: `<Path>`, and the `</Path>` that is forced where a limit cut it.
PATH_TAGS = 2


@dataclass(frozen=True, slots=True)
class Longest:
    """Where a recipe does not bound them: tokens of a prompt, and of an SFT row with all that belongs to it.

    The defaults are what Parallel-R1 keeps of its data (arXiv 2509.07980).
    """

    prompt: int = 2000
    example: int = 4096


def longest_response(thinking: Thinking) -> int:
    """Tokens of a flat response at most; all paths of a block may fill one critical path."""
    together = 1 if thinking.mode == "sequential" else thinking.paths**thinking.max_depth
    critical = thinking.max_critical_tokens or thinking.max_response_tokens
    return min(thinking.max_response_tokens, critical * together)


def longest_branches(thinking: Thinking) -> int:
    """Tokens that `replay` repeats behind a response: paths 2..N of each block, once a level of nesting."""
    if thinking.mode != "replay" or thinking.paths == 1 or thinking.max_blocks == 0:
        return 0
    response = longest_response(thinking)
    if thinking.max_depth > 1:
        return thinking.max_depth * response
    repeated = thinking.max_blocks * (thinking.paths - 1) * (thinking.max_path_tokens + PATH_TAGS)
    return min(response, repeated)


def longest_row(thinking: Thinking, prompt: int) -> int:
    """Tokens of a trace's row at most, behind a prompt of so many.

    The engine's cache holds no more of it: in `replay` a block is joined by writing paths 2..N once more.
    """
    return prompt + longest_response(thinking) + longest_branches(thinking)
