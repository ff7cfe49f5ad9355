"""What a policy is trained towards: the settings of GRPO and its family, by their papers' names and defaults.

Each choice's formula stands in the file of its name: advantage, aggregation, ratios, surrogate, kl,
correction, overlong, credit. `loss.policy_loss` puts them together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Advantage = Literal["grpo", "dr_grpo", "rloo"]
Aggregation = Literal["token", "sequence", "constant"]
Ratio = Literal["token", "sequence", "sequence_token"]
Surrogate = Literal["ppo", "cispo"]
Kl = Literal["none", "k1", "k2", "k3"]
Correction = Literal["none", "truncate", "mask"]
CorrectionLevel = Literal["token", "sequence", "geometric"]


@dataclass(frozen=True, slots=True)
class Objective:
    """Settings of the loss; the defaults are token-level GRPO with DAPO's clip-higher, as in Parallel-R1.

    Attributes:
        advantage: of a trace against the others of its problem.
        aggregation: how much each target weighs (DAPO: token; GRPO: sequence; Dr. GRPO: constant).
        constant_length: what a trace's sum is divided by under `constant`: tokens of the longest response.
        ratio: of one token (GRPO), of its whole trace (GSPO, which clips at 3e-4 and 4e-4), or the trace's
            with the token's gradient (GSPO-token).
        surrogate: the clipped minimum of PPO, or CISPO's clipped weight.
        clip_low, clip_high: bounds of the ratio, 1 - low .. 1 + high. CISPO's paper bounds above only: low 1.
        dual_clip: the most that a ratio counts where the advantage is negative; its paper has 3. None: any.
        kl: estimate of KL(policy || reference); `none` needs no reference.
        kl_in: a term of the loss, or a penalty within the trace's reward.
        kl_coefficient: the paper of GRPO has 0.04.
        entropy_coefficient: of the bonus in the loss.
        correction: of the gap between the engine that sampled and the trainer, by truncated or by masked
            importance weights.
        correction_level: the weight of a token, or of its trace by product or by geometric mean.
        correction_cap: weights above it are cut to it (truncate) or to 0 (mask).
        correction_low: weights below it are cut to 0 (mask).
        mask_truncated: traces that a limit ended carry no loss.
        overlong_cache: tokens before the limit over which a trace's penalty grows from 0 to
            `overlong_penalty`; 0: no penalty.
        path_credit: a path's tokens take their advantage from that path's own answer, against its siblings.
    """

    # For pydantic, which reads these settings from a recipe: an unknown key is an error.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    advantage: Advantage = "grpo"
    aggregation: Aggregation = "token"
    constant_length: int | None = None
    ratio: Ratio = "token"
    surrogate: Surrogate = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    kl: Kl = "none"
    kl_in: Literal["loss", "reward"] = "loss"
    kl_coefficient: float = 0.04
    entropy_coefficient: float = 0.0
    correction: Correction = "none"
    correction_level: CorrectionLevel = "token"
    correction_cap: float = 2.0
    correction_low: float = 0.5
    mask_truncated: bool = False
    overlong_cache: int = 0
    overlong_penalty: float = 1.0
    path_credit: bool = False

    def __post_init__(self) -> None:
        constant, dual = self.constant_length, self.dual_clip
        # Written so that NaN fails each. A whole trace's ratio has one gradient for all its tokens, in which
        # advantages of single paths would only be averaged; CISPO takes no gradient from the ratio.
        checks = {
            "constant_length must be >= 1": constant is None or constant >= 1,
            "aggregation constant needs constant_length": self.aggregation != "constant"
            or constant is not None,
            "clip_low must be in (0, 1]": 0 < self.clip_low <= 1,
            "clip_high must be > 0": self.clip_high > 0,
            "dual_clip must be > 1": dual is None or dual > 1,
            "dual_clip belongs to surrogate ppo": dual is None or self.surrogate == "ppo",
            "kl_coefficient must be >= 0 and finite": 0 <= self.kl_coefficient < math.inf,
            "entropy_coefficient must be finite": math.isfinite(self.entropy_coefficient),
            "correction_cap must be > 0": self.correction_cap > 0,
            "correction_low must be >= 0 and below correction_cap": self.correction != "mask"
            or 0 <= self.correction_low < self.correction_cap,
            "overlong_cache must be >= 0": self.overlong_cache >= 0,
            "overlong_penalty must be >= 0 and finite": 0 <= self.overlong_penalty < math.inf,
            "path_credit needs ratio token or sequence_token": not self.path_credit
            or self.ratio != "sequence"
            or self.surrogate == "cispo",
        }
        broken = [what for what, holds in checks.items() if not holds]
        if broken:
            raise ValueError("; ".join(broken))
