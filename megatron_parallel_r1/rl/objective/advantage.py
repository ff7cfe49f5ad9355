"""Advantages of traces from their rewards, and which groups have any.

Shapes: P prompts, G traces of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.tree import Tree
from megatron_parallel_r1.utils.user_function import in_one_line, load_function

Float64 = NDArray[np.float64]
# Added to a standard deviation, as in the reference implementations.
EPS = 1e-6


def group_advantages(rewards_PG: Float64, eps: float = EPS) -> Float64:
    """Each reward against its group: (r - mean) / (std + eps), GRPO (arXiv 2402.03300, section 4.1.2).

    The standard deviation is the sample's (divided by G - 1), as in the reference implementations. A group of
    equal rewards has advantages of 0.
    """
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdims=True)
    if rewards_PG.shape[1] < 2:
        return np.zeros_like(centred_PG)
    return centred_PG / (rewards_PG.std(1, ddof=1, keepdims=True) + eps)


def dr_grpo_advantages(rewards_PG: Float64) -> Float64:
    """r - mean, Dr. GRPO (arXiv 2503.20783, section 3.2).

    Omits the division by the standard deviation, which gives more weight to problems that are nearly always
    or nearly never solved.
    """
    return rewards_PG - rewards_PG.mean(1, keepdims=True)


def rloo_advantages(rewards_PG: Float64) -> Float64:
    """Each reward minus the mean of the others in its group, REINFORCE leave-one-out (arXiv 2402.14740).

    The baseline does not depend on the trace itself, so the policy gradient is unbiased. It is Dr. GRPO's
    advantage times G / (G - 1).
    """
    size = rewards_PG.shape[1]
    if size < 2:
        return np.zeros_like(rewards_PG)
    others_PG = (rewards_PG.sum(1, keepdims=True) - rewards_PG) / (size - 1)
    return rewards_PG - others_PG


def papo_advantages(rewards_PG: Float64, eps: float = EPS) -> Float64:
    """(r - mean of the group) / (std of the batch + eps), PAPO of NPR (arXiv 2512.07461).

    One scale for the whole batch gives no more weight to problems that are nearly always or nearly never
    solved. The standard deviation is the sample's, of all rewards of the step.
    """
    return dr_grpo_advantages(rewards_PG) / (_batch_deviation(rewards_PG) + eps)


def _batch_deviation(rewards: Float64) -> float:
    """Sample standard deviation of all rewards of a step; 0 of fewer than two."""
    return float(rewards.std(ddof=1)) if rewards.size > 1 else 0.0


def informative(rewards_PG: Float64) -> NDArray[np.bool_]:
    """Returns for each prompt whether its rewards differ; DAPO (arXiv 2503.14476, eq. 11) keeps only these.

    If all rewards are equal, every advantage is 0: the group costs compute and dilutes the gradient.

    Args:
        rewards_PG: before penalties that differ from trace to trace anyway, such as a KL penalty. NaN: the
            trace has no reward.
    """
    unscored_PG = np.isnan(rewards_PG)
    highest_P = np.where(unscored_PG, -np.inf, rewards_PG).max(1)
    return highest_P > np.where(unscored_PG, np.inf, rewards_PG).min(1)


ADVANTAGES: dict[str, Callable[[Float64], Float64]] = {
    "grpo": group_advantages,
    "dr_grpo": dr_grpo_advantages,
    "rloo": rloo_advantages,
    "papo": papo_advantages,
}


def estimator(name: str) -> Callable[[Float64], Float64]:
    """The estimator of a name, or the user's `module:function`, whose result is checked."""
    return ADVANTAGES.get(name) or partial(_own_advantages, name)


def _own_advantages(name: str, rewards_PG: Float64) -> Float64:
    """
    Raises:
        UserError: the user's function raised, or returned another shape or a number that is not finite.
    """
    what = f"objective.advantage {name}"
    try:
        advantages_PG = np.array(load_function(name, what)(rewards_PG.copy()), float)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what}: {in_one_line(error)}") from error
    if advantages_PG.shape != rewards_PG.shape or not np.isfinite(advantages_PG).all():
        raise UserError(
            f"{what}: it returned {in_one_line(advantages_PG)} for rewards of shape {rewards_PG.shape}; "
            "return a finite number for each"
        )
    return advantages_PG


def scored_advantages(
    name: str, rewards_PG: Float64, unscored_PG: NDArray[np.bool_]
) -> Float64 | np.ma.MaskedArray:
    """Advantages [P, G] in which traces without a reward are masked and count in no mean of their group."""
    if not unscored_PG.any():
        return estimator(name)(rewards_PG)
    if name == "papo":  # its scale is of all groups together, not of each
        centred_PG = scored_advantages("dr_grpo", rewards_PG, unscored_PG)
        return centred_PG / (_batch_deviation(rewards_PG[~unscored_PG]) + EPS)
    estimate = estimator(name)
    advantages_PG = np.ma.array(np.zeros(rewards_PG.shape), mask=unscored_PG)
    is_whole_P = ~unscored_PG.any(1)
    if is_whole_P.any():
        advantages_PG.data[is_whole_P] = estimate(rewards_PG[is_whole_P])
    for p in np.flatnonzero(~is_whole_P & ~unscored_PG.all(1)):
        scored_G = ~unscored_PG[p]
        advantages_PG.data[p, scored_G] = estimate(rewards_PG[p, scored_G][None])[0]
    return advantages_PG


# The accuracy reward of Parallel-R1 (arXiv 2509.07980): +1 for a right answer, -1 for a wrong one.
RIGHT, WRONG = 1.0, -1.0


def path_advantages(
    tree: Tree, correct: Sequence[Sequence[bool | None]], advantage: float, kind: str = "grpo"
) -> Float64:
    """The advantage of each token of a trace, float64 [L]. An option of this project, not of the paper.

    Tokens of a path with an answer take the advantage of that answer among the siblings' answers, by the
    estimator that compares traces. All other tokens keep the trace's advantage: the main chain, summaries,
    paths without an answer or without a sibling that has one. Siblings that are all right, or all wrong,
    have advantage 0. Paths of a nested block are compared among themselves.

    Args:
        correct: for each block of `tree.all_blocks()` and each of its paths, whether its own answer is
            right; None if it gives none.
        advantage: the trace's advantage.
        kind: the estimator's name.
    """
    advantages_L = np.full(tree.length, advantage)
    # Outer blocks come first, so that inner ones overwrite the advantages of their own tokens.
    for (_, block), verdicts in zip(tree.all_blocks(), correct, strict=True):
        judged = [
            (path, RIGHT if verdict else WRONG)
            for path, verdict in zip(block.paths, verdicts, strict=True)
            if verdict is not None
        ]
        if len(judged) < 2:
            continue
        rewards_1G = np.array([[reward for _, reward in judged]])
        for (path, _), own in zip(judged, estimator(kind)(rewards_1G)[0], strict=True):
            advantages_L[path.start : path.stop] = own
    return advantages_L
