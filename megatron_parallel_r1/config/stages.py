"""The stages of a recipe: supervised and reinforcement learning, with their optimizer and reward."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from megatron_parallel_r1.config.data import (
    Count,
    ExampleSource,
    ProblemSource,
    Share,
    Strict,
)
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards import base as rewards
from megatron_parallel_r1.rewards.registry import make_component, make_reward
from megatron_parallel_r1.rewards.schedule import ONE, Constant, Linear, Window
from megatron_parallel_r1.rl.objective.filtering import DynamicSampling
from megatron_parallel_r1.rl.objective.settings import Objective
from megatron_parallel_r1.run.early_stopping import EarlyStopping

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Strict):
    """AdamW; the rate rises over `warmup_steps` and then falls linearly to `final_lr_fraction` x `lr`.

    A larger `eps` holds parameters still whose gradient is mere noise, such as rows of unused tokens.
    """

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_lr_fraction: Share = 1.0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_grad_norm: Annotated[float, Field(ge=0)] = 1.0


class Stage(Strict):
    """What all stages have.

    Attributes:
        start_from: the stage whose weights it begins with; None: the stage before it, or the model.
        thinking: settings that differ from the recipe's.
        carry_optimizer: begin with the optimizer's state of the stage before, not with a fresh one.
        early_stopping: end before `steps` when a metric rises no more.
        evaluate: whether to evaluate when the stage is done.
        save_every: steps between two checkpoints.
        keep_last: how many of them are kept.
        keep_best: keep also the one of the best score (`curriculum.loop.SCORES`), beyond the stage's end.
        max_bad_steps: steps in a row whose loss or gradient is not finite that end the run; each is left out.
    """

    name: Name
    start_from: Name | None = None
    steps: Count
    optimizer: Optimizer
    thinking: dict[str, Any] = Field(default_factory=dict)
    carry_optimizer: bool = False
    early_stopping: EarlyStopping | None = None
    evaluate: bool = False
    save_every: Count = 50
    keep_last: Count = 2
    keep_best: bool = False
    max_bad_steps: Count = 3


class SftStage(Stage):
    """Supervised: `examples_per_step` worked examples a step, trained under the thinking mode's layout."""

    kind: Literal["sft"]
    data: ExampleSource
    examples_per_step: Count


def _constant(given: Any) -> Any:
    """A bare number is a constant weight."""
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    return {"kind": "constant", "value": given} if is_number else given


Setting = bool | int | float | str
Weight = Annotated[
    Annotated[Constant | Linear | Window, Field(discriminator="kind")], BeforeValidator(_constant)
]


class RewardComponent(Strict):
    """One term of a reward with its weight over the steps; `name` is its metric's."""

    term: str
    settings: dict[str, Setting] = Field(default_factory=dict)
    weight: Weight = ONE
    name: str | None = None


class Reward(Strict):
    """Either the `name` of a reward with its `settings`, or the `components` that it adds up.

    A name or a term may be `module:function` (rewards/registry.py).
    """

    name: str = "accuracy"
    settings: dict[str, Setting] = Field(default_factory=dict)
    components: tuple[RewardComponent, ...] = ()

    @model_validator(mode="after")
    def _possible(self) -> Reward:
        if self.components and (self.name != "accuracy" or self.settings):
            raise ValueError("give either name (and its settings) or components")
        try:
            self.make()
        except UserError as error:
            raise ValueError(str(error)) from None
        return self

    def make(self) -> rewards.Reward:
        if not self.components:
            return make_reward(self.name, self.settings)
        parts = [make_component(c.term, c.settings, c.weight, c.name) for c in self.components]
        return rewards.Reward(tuple(parts))


class RlStage(Stage):
    """GRPO: `samples_per_prompt` traces of each of `prompts_per_step` problems a step.

    Attributes:
        epochs, mini_batches: the traces of a step are gone through `epochs` times, in `mini_batches` updates
            each.
        objective: advantage, loss and corrections.
        dynamic_sampling: dynamic sampling; None: every group is trained.
        max_off_policy_steps: rollouts by weights up to this many updates old, while earlier traces train;
            0: in turn.
        partial_rollout: traces under way take new weights, if `max_off_policy_steps` is set; no two runs are
            then the same.
        reference_every: after so many steps the reference of a KL term takes the trained weights; 0: it stays
            the policy that the stage began with.
        max_concurrent_rollouts: traces in flight at most.
        keep_traces: traces of each step that are kept for the report.
    """

    kind: Literal["rl"]
    data: ProblemSource
    prompts_per_step: Count
    samples_per_prompt: Annotated[int, Field(ge=2)]
    reward: Reward = Reward()
    epochs: Count = 1
    mini_batches: Count = 1
    objective: Objective = Objective()
    dynamic_sampling: DynamicSampling | None = None
    max_off_policy_steps: Annotated[int, Field(ge=0)] = 0
    partial_rollout: bool = False
    reference_every: Annotated[int, Field(ge=0)] = 0
    max_concurrent_rollouts: Count = 512
    keep_traces: Annotated[int, Field(ge=0)] = 2

    @model_validator(mode="after")
    def _divisible(self) -> RlStage:
        if self.mini_batches > self.prompts_per_step:
            raise ValueError(
                f"{self.mini_batches} mini-batches need as many prompts, there are {self.prompts_per_step}"
            )
        if self.reference_every and self.objective.kl == "none":
            raise ValueError("reference_every: there is no reference without objective.kl")
        if self.partial_rollout and not self.max_off_policy_steps:
            raise ValueError(
                "partial_rollout: traces meet newer weights only with a max_off_policy_steps of 1 at least"
            )
        return self
