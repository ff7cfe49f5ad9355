"""The weight of each target in the loss.

The loss is a weighted sum over targets, and the trainer divides its gradient by the number of all targets of
the update over all ranks. The weights turn that into any other mean. They depend on the whole update, so
they are computed before packing, and the result does not depend on how rows are split over micro-batches and
ranks.

Shapes: T traces of the update.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_parallel_r1.config.objective import Aggregation


def target_weights(
    targets_T: NDArray[np.int64],
    aggregation: Aggregation,
    constant_length: int | None = None,
    kept_T: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """The weight of each trace's targets, float64 [T]. With M targets in all, and l the loss of a target:

        token     sum of all l / M            -> 1                    DAPO (arXiv 2503.14476, eq. 12)
        sequence  mean over traces of mean l  -> M / (T n_i)          GRPO (arXiv 2402.03300, eq. 3)
        constant  sum of all l / (T constant) -> M / (T constant)     Dr. GRPO (arXiv 2503.20783, section 3.2)

    A trace that is not kept has weight 0. T and the token-level divisor count kept traces only, while M, the
    trainer's divisor, counts all.

    Args:
        targets_T: number of targets of each trace of the update, n_i.
        constant_length: divisor of `constant`, in tokens.
        kept_T: which traces carry loss; None: all.
    """
    kept_T = (targets_T > 0) & (True if kept_T is None else kept_T)
    everything, traces = targets_T.sum(), kept_T.sum()
    if aggregation == "token":
        share_T = np.full(len(targets_T), 1.0 / max(1, targets_T[kept_T].sum()))
    elif aggregation == "sequence":
        share_T = 1.0 / (max(1, traces) * np.maximum(1, targets_T))
    else:
        assert constant_length is not None, "a constant aggregation has a constant"
        share_T = np.full(len(targets_T), 1.0 / (max(1, traces) * constant_length))
    return np.where(kept_T, everything * share_T, 0.0)
