"""Settings of GRPO and its family, with the names and defaults of their papers.

The formula of each choice is in the file of its name: advantage, aggregation, surrogate, kl, correction,
overlong. `loss.policy_loss` combines them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.settings import Count, Settings, Tokens, TokensOrZero
from megatron_parallel_r1.utils.user_function import load_with_parameters


def _named_or_own(value: Any, names: tuple[str, ...], what: str, parameters: str) -> Any:
    """Checks the name of a formula: a known one, or the user's `module:function`, which is imported."""
    if not isinstance(value, str) or value in names:
        return value
    if ":" not in value:
        raise ValueError(f"use one of {', '.join(names)}, or module:function")
    try:
        load_with_parameters(value, f"objective.{what}", parameters)
    except UserError as error:
        raise ValueError(str(error)) from None
    return value


ADVANTAGES = ("grpo", "dr_grpo", "rloo", "papo")
SURROGATES = ("ppo", "cispo")
OwnFunction = Annotated[str, Field(pattern=":")]
Advantage = Annotated[
    Literal["grpo", "dr_grpo", "rloo", "papo"] | OwnFunction,
    BeforeValidator(lambda value: _named_or_own(value, ADVANTAGES, "advantage", "rewards_PG")),
]
Aggregation = Literal["token", "sequence", "constant"]
Ratio = Literal["token", "sequence", "sequence_token"]
Surrogate = Annotated[
    Literal["ppo", "cispo"] | OwnFunction,
    BeforeValidator(
        lambda value: _named_or_own(value, SURROGATES, "surrogate", "logprobs_N, ratio_N, values")
    ),
]
Kl = Literal["none", "k1", "k2", "k3"]
Correction = Literal["none", "truncate", "mask"]
CorrectionLevel = Literal["token", "sequence", "geometric"]


FiniteOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Objective(Settings):
    """Settings of the loss; the defaults are token-level GRPO with DAPO's clip-higher, as in Parallel-R1."""

    advantage: Advantage = "grpo"
    """Advantage of a trace against the others of its problem; or `module:function` (docs/rl.md)."""
    aggregation: Aggregation = "token"
    """Weight of each target token (DAPO: token; GRPO: sequence; Dr. GRPO: constant)."""
    constant_length: Tokens | None = None
    """Divisor of a trace's sum with aggregation `constant`: the length of the longest response."""
    ratio: Ratio = "token"
    """Ratio of one token (GRPO), of the whole trace (GSPO, which clips at 3e-4 and 4e-4), or the trace's with
    the token's gradient (GSPO-token)."""
    surrogate: Surrogate = "ppo"
    """PPO's clipped minimum, CISPO's clipped weight, or `module:function` (docs/rl.md)."""
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Lower bound of the ratio is 1 - clip_low; CISPO's paper bounds above only: 1."""
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    """Upper bound of the ratio is 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Largest ratio where the advantage is negative; its paper uses 3. null: unbounded."""
    kl: Kl = "none"
    """Estimator of KL(policy || reference); `none` needs no reference."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL enters: as a term of the loss, or as a penalty within the trace's reward."""
    kl_coefficient: FiniteOrZero = 0.04
    """Weight of the KL; the default is that of the GRPO paper."""
    entropy_coefficient: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Weight of the entropy bonus in the loss."""
    correction: Correction = "none"
    """Correction of the gap between the engine that sampled and the trainer, by truncated or masked
    importance weights."""
    correction_level: CorrectionLevel = "token"
    """Importance weight of a token, or of its trace by product or by geometric mean."""
    correction_cap: Annotated[float, Field(gt=0)] = 2.0
    """Larger importance weights are cut to this value (truncate) or to 0 (mask)."""
    correction_low: float = 0.5
    """Smaller importance weights are cut to 0 (mask)."""
    mask_truncated: bool = False
    """Exclude traces that a limit ended from the loss."""
    overlong_cache: TokensOrZero = 0
    """Tokens before the limit over which a trace's penalty grows from 0 to `overlong_penalty`; 0: no
    penalty."""
    overlong_penalty: FiniteOrZero = 1.0
    """Penalty of a trace at the limit."""
    replay_experts: bool = True
    """In a mixture of experts, each token goes through the experts that the engine chose for it (R3, arXiv
    2510.11370): the native engine, or SGLang servers that return them. false: the router chooses again."""
    path_credit: bool = False
    """A path's tokens take their advantage from that path's own answer, against its siblings."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Objective:
        if self.aggregation == "constant" and self.constant_length is None:
            raise ValueError("aggregation constant needs constant_length")
        if self.dual_clip is not None and self.surrogate != "ppo":
            raise ValueError("dual_clip belongs to surrogate ppo")
        # Written so that NaN fails.
        if self.correction == "mask" and not 0 <= self.correction_low < self.correction_cap:
            raise ValueError("correction_low must be >= 0 and below correction_cap")
        # A trace-level ratio has one gradient for all tokens, in which per-path advantages would only be
        # averaged; CISPO takes no gradient from the ratio.
        if self.path_credit and self.ratio == "sequence" and self.surrogate != "cispo":
            raise ValueError("path_credit needs ratio token or sequence_token")
        return self


class DynamicSampling(Settings):
    """Dynamic sampling, DAPO (arXiv 2503.14476, section 3.2): train only groups whose rewards differ."""

    max_rounds: Count = 3
    """Rounds of further problems that replace the other groups; 1 only drops them."""
    oversampling: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Problems of a round, as a multiple of those that are missing."""
