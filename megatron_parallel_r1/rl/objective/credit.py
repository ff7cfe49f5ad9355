"""Per-path credit: a path's tokens answer for that path.

Shapes: L tokens of a flat response.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_parallel_r1.rl.objective.advantage import ADVANTAGES, Float64
from megatron_parallel_r1.rl.objective.settings import Advantage
from megatron_parallel_r1.thought.tree import Tree

# As the accuracy reward of Parallel-R1 (arXiv 2509.07980): +1 for a right answer, -1 for a wrong one.
RIGHT, WRONG = 1.0, -1.0


def path_advantages(
    tree: Tree, correct: Sequence[Sequence[bool | None]], advantage: float, kind: Advantage = "grpo"
) -> Float64:
    """The advantage of each token of a trace, float64 [L]. An option of this project, not of the paper.

    Tokens of a path whose answer is known take their advantage from a comparison with the siblings whose
    answers are known too, by the same estimator that compares traces. All other tokens keep the trace's:
    the main chain, summaries, a path without an answer, one without a sibling to compare with. Siblings
    that are all right, or all wrong, teach nothing about each other: their advantage is 0. A nested block's
    paths are compared among themselves.

    Args:
        correct: for each block of `tree.all_blocks()` and each of its paths, whether its own answer is
            right; None where it gives none.
        advantage: of the trace.
        kind: the estimator.
    """
    advantages_L = np.full(tree.length, advantage)
    # Outer blocks come first, so that the inner ones have the last word on their own tokens.
    for (_, block), verdicts in zip(tree.all_blocks(), correct, strict=True):
        judged = [
            (path, RIGHT if verdict else WRONG)
            for path, verdict in zip(block.paths, verdicts, strict=True)
            if verdict is not None
        ]
        if len(judged) < 2:
            continue
        rewards_1G = np.array([[reward for _, reward in judged]])
        for (path, _), own in zip(judged, ADVANTAGES[kind](rewards_1G)[0], strict=True):
            advantages_L[path.start : path.stop] = own
    return advantages_L
