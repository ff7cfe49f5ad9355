"""Drills for the very first stage: the arithmetic of a try, before any tag is seen.

Half of them are streams of tries that do not stop at a solution, which is practice of the tables alone;
half are searches that end by stating the result and the answer.
"""

from __future__ import annotations

import random

from megatron_parallel_r1.data.embedded.congruence import MODULUS, Congruence

MOST_TRIES = 8


def write_drill(congruence: Congruence, rng: random.Random) -> str:
    """A response to `congruence.question` that is right throughout and has no tags.

    At most 1 + 5 * 8 + 4 words: `need=…`, up to eight tries of different values, and how it ended.
    """
    words = [f"need={congruence.need}"]
    tries = rng.sample(range(MODULUS), rng.randint(1, MOST_TRIES))
    stops_at_solution = rng.random() < 0.5
    for x in tries:
        words += congruence.attempt(x)
        if stops_at_solution and x in congruence.roots:
            return " ".join([*words, f"found={x}", "Final", "Answer:", str(x)])
    return " ".join([*words, "none", "Final", "Answer:", "none"] if stops_at_solution else words)
