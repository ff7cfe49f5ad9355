"""Random traces for property tests: token lists with nested blocks, possibly truncated."""

from __future__ import annotations

import random

from megatron_parallel_r1.thought.tags import Tags

TAGS = Tags(parallel=0, parallel_end=1, path=2, path_end=3, summary=4, summary_end=5, eos=6)
FIRST_TEXT = 7


def random_trace(
    seed: int,
    depth: int = 3,
    most_paths: int = 4,
    most_blocks: int = 2,
    most_text: int = 4,
    vocabulary: int = 30,
    truncate: bool = False,
) -> list[int]:
    """A well-formed trace of random text and blocks; with `truncate` cut at a random token."""
    rng = random.Random(seed)

    def text(least: int = 0) -> list[int]:
        count = rng.randint(least, most_text)
        return [rng.randrange(FIRST_TEXT, vocabulary) for _ in range(count)]

    def chain(level: int) -> list[int]:
        tokens = text()
        for _ in range(rng.randint(0, most_blocks) if level else 0):
            tokens.append(TAGS.parallel)
            for _ in range(rng.randint(1, most_paths)):
                tokens += [TAGS.path, *chain(rng.randrange(level)), TAGS.path_end]
            tokens += [TAGS.parallel_end, TAGS.summary, *text(), TAGS.summary_end, *text()]
        return tokens

    tokens = [*chain(depth), TAGS.eos]
    return tokens[: rng.randint(1, len(tokens))] if truncate else tokens
