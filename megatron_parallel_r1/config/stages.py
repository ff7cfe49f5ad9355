"""The stages of a recipe: supervised fine-tuning, reinforcement learning, and distillation of own traces."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_parallel_r1.config.data import ExampleSource, ProblemSource
from megatron_parallel_r1.config.early_stopping import WATCHABLE, EarlyStopping
from megatron_parallel_r1.config.evaluation import EvaluationSet, Name, StageEvaluation
from megatron_parallel_r1.config.objective import DynamicSampling, Objective
from megatron_parallel_r1.config.selection import Balance, Check
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards import base as rewards
from megatron_parallel_r1.rewards.registry import make_component, make_reward
from megatron_parallel_r1.rewards.schedule import CONSTANT_ONE, Constant, Linear, Window
from megatron_parallel_r1.rewards.user_calls import CallLimits
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.utils.settings import (
    Count,
    CountOrZero,
    Seconds,
    Settings,
    Share,
    Steps,
    StepsOrZero,
    Unit,
)

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Settings):
    """AdamW. The learning rate warms up linearly and then decays linearly."""

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Peak learning rate."""
    warmup_steps: StepsOrZero = 0
    """Steps over which the learning rate rises."""
    final_lr_fraction: Share = 1.0
    """Learning rate of the last step, as a fraction of `lr`."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of Adam's two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's epsilon; a larger one holds parameters still whose gradient is mere noise, such as rows of
    unused tokens."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    clip_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; larger gradients are scaled down. 0: no clipping."""


class Stage(Settings):
    """Settings that all stages have."""

    name: Name
    """Name of the stage and of its folder."""
    kind: str
    start_from: Name | None = None
    """Earlier stage whose weights this one starts from; null: the stage before it, or the model."""
    steps: Steps
    """Steps of the stage."""
    thinking: dict[str, Any] = Field(default_factory=dict)
    """Keys of `thinking` with other values in this stage."""

    @property
    def samples_traces(self) -> bool:
        """Whether the stage needs a rollout engine."""
        return False

    @property
    def evaluation_sets(self) -> dict[str, EvaluationSet]:
        """The sets that the stage is evaluated on while it trains, by name."""
        return {}

    def check_thinking(self, thinking: Thinking) -> None:
        """Checks the stage against its decoding settings, the recipe's and its own together.

        Raises:
            ValueError: they do not fit.
        """


class TrainingStage(Stage):
    """Settings of the stages that train weights."""

    optimizer: Optimizer
    """Optimizer and learning rate."""
    carry_optimizer: bool = False
    """Start with the optimizer state of the stage before instead of a fresh one."""
    early_stopping: EarlyStopping | None = None
    """End before `steps` when a metric no longer improves; null: never."""
    evaluate: bool = False
    """Evaluate at the end of the stage."""
    evaluate_during: StageEvaluation | None = None
    """Evaluate while the stage trains, on sets of its own; null: do not."""
    save_every: Steps = 50
    """Steps between two checkpoints."""
    save_every_minutes: Annotated[float, Field(ge=0), Unit("minutes")] = 20.0
    """Longest time without a checkpoint, whatever `save_every` says; a step is never interrupted. 0: none."""
    keep_last: Count = 2
    """Checkpoints that are kept."""
    keep_best: bool | str = False
    """Also keep the checkpoint with the best mean of a metric, beyond the stage's end: true (`accuracy` in
    RL, `loss` in SFT), or the metric, such as `reward`; `evaluation/SET/MODE/accuracy` is that of a set of
    `evaluate_during`, and then the checkpoints of evaluated steps are compared."""
    max_bad_steps: Steps = 3
    """Consecutive steps with a loss or gradient that is not finite that end the run; each is skipped."""

    @model_validator(mode="after")
    def _check_metrics(self) -> TrainingStage:
        watched = {"keep_best": self.keep_best} if isinstance(self.keep_best, str) else {}
        if self.early_stopping:
            watched["early_stopping.metric"] = self.early_stopping.metric
        watchable = self.watchable()
        for key, metric in watched.items():
            if metric not in watchable:
                raise ValueError(f"{key} {metric!r} is none of {', '.join(watchable)}")
        return self

    def watchable(self) -> tuple[str, ...]:
        """The metrics that `keep_best` and `early_stopping` can watch."""
        during = self.evaluate_during.watchable() if self.evaluate_during else ()
        return (*WATCHABLE.get(self.kind, ()), *during)

    @property
    def evaluation_sets(self) -> dict[str, EvaluationSet]:
        return self.evaluate_during.sets if self.evaluate_during else {}

    @property
    def best_metric(self) -> str:
        """The metric that ranks checkpoints."""
        if isinstance(self.keep_best, str):
            return self.keep_best
        return {"rl": "accuracy"}.get(self.kind, "loss")

    @property
    def samples_traces(self) -> bool:
        return self.kind == "rl" or self.evaluate or self.evaluate_during is not None


class SftStage(TrainingStage):
    """Supervised fine-tuning on worked examples, with the layout of the thinking mode."""

    kind: Literal["sft"]
    """Stage: supervised fine-tuning."""
    data: ExampleSource
    """Worked examples."""
    examples_per_step: Count
    """Worked examples of a training step (the global batch size)."""
    held_out_examples: CountOrZero = 0
    """Worked examples that are not trained on; their mean loss is the metric `held_out_loss`, that of their
    tags `held_out_tag_loss`. Of generated data they are drawn with another seed, and one may be met again."""
    held_out_every: Steps = 16
    """Steps after which these are measured; also after the last one."""

    @property
    def step_size(self) -> int:
        """Examples of a step."""
        return self.examples_per_step


def _number(value: Any) -> Any:
    """A number that YAML 1.1 reads as text, such as `1e-1`, which it wants as `1.0e-1`."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return value


def _constant(value: Any) -> Any:
    """A bare number is a constant weight."""
    value = _number(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"kind": "constant", "value": value} if is_number else value


Setting = Annotated[bool | int | float | str, BeforeValidator(_number)]
Weight = Annotated[
    Annotated[Constant | Linear | Window, Field(discriminator="kind")], BeforeValidator(_constant)
]


class RewardComponent(Settings):
    """One term of a reward with its weight."""

    term: str
    """Name of a term, or `module:function` (`rewards/registry.py`)."""
    settings: dict[str, Setting] = Field(default_factory=dict)
    """Settings of the term."""
    weight: Weight = CONSTANT_ONE
    """Weight over the steps; a bare number is constant."""
    name: str | None = None
    """Name of the metric; null: that of the term."""


class RewardSource(Settings):
    """Either the `name` of a reward with its `settings`, or the `components` that it adds up."""

    name: str = "accuracy"
    """Name of a reward, or `module:function` (`rewards/registry.py`)."""
    settings: dict[str, Setting] = Field(default_factory=dict)
    """Settings of the named reward."""
    components: tuple[RewardComponent, ...] = ()
    """Terms that are added up, instead of a name."""
    call_timeout_s: Seconds | None = None
    """Time limit of one call of a function of yours; beyond it, its traces count as without a reward. null:
    none."""
    max_concurrent_calls: Count | None = None
    """Most calls of a function of yours at once, in each replica; null: 1, of an `async` function 64."""

    @model_validator(mode="after")
    def _check_exists(self) -> RewardSource:
        if self.components and (self.name != "accuracy" or self.settings):
            raise ValueError("give either name (and its settings) or components")
        try:
            self.make()
        except UserError as error:
            raise ValueError(str(error)) from None
        return self

    def make(self) -> rewards.Reward:
        limits = CallLimits(self.call_timeout_s, self.max_concurrent_calls)
        if not self.components:
            return make_reward(self.name, self.settings, limits)
        parts = [make_component(c.term, c.settings, c.weight, c.name, limits) for c in self.components]
        return rewards.Reward(tuple(parts))


class RlStage(TrainingStage):
    """GRPO and its family on problems with a right answer."""

    kind: Literal["rl"]
    """Stage: reinforcement learning."""
    data: ProblemSource
    """Problems to solve."""
    prompts_per_step: Count
    """Problems of a training step."""
    samples_per_prompt: Annotated[int, Field(ge=2)]
    """Traces sampled for each problem (the group size)."""
    reward: RewardSource = RewardSource()
    """Reward of a trace."""
    epochs: Count = 1
    """Passes over the traces of a step."""
    mini_batches: Count = 1
    """Optimizer updates of a pass."""
    objective: Objective = Objective()
    """Advantage, loss and corrections."""
    dynamic_sampling: DynamicSampling | None = None
    """Replace groups whose rewards are all equal; null: train on every group."""
    max_off_policy_steps: StepsOrZero = 0
    """Optimizer steps by which rollouts may be older than the weights that train on them, so that rollouts
    and training overlap; 0: they alternate."""
    partial_rollout: bool = False
    """Running traces continue with new weights, if `max_off_policy_steps` is set; no two runs are then
    equal."""
    reference_every: StepsOrZero = 0
    """Steps after which the reference of a KL term takes the trained weights; 0: it stays the policy that the
    stage started from."""
    max_concurrent_rollouts: Count = 512
    """Most traces in flight."""
    keep_traces: CountOrZero = 2
    """Traces of each step that are kept for the report."""

    @model_validator(mode="after")
    def _check_combinations(self) -> RlStage:
        if self.mini_batches > self.prompts_per_step:
            raise ValueError(
                f"{self.mini_batches} mini-batches need as many prompts, there are {self.prompts_per_step}"
            )
        if self.reference_every and self.objective.kl == "none":
            raise ValueError("reference_every: there is no reference without objective.kl")
        if self.partial_rollout and not self.max_off_policy_steps:
            raise ValueError("partial_rollout needs a max_off_policy_steps of 1 at least")
        return self

    @property
    def step_size(self) -> int:
        """Traces of a step."""
        return self.prompts_per_step * self.samples_per_prompt

    def watchable(self) -> tuple[str, ...]:
        parts = (f"reward_{component.name}" for component in self.reward.make().components)
        return (*super().watchable(), *parts)

    def check_thinking(self, thinking: Thinking) -> None:
        if self.objective.overlong_cache > thinking.max_response_tokens:
            raise ValueError(
                f"overlong_cache {self.objective.overlong_cache} is more than the "
                f"{thinking.max_response_tokens} tokens of a response"
            )
        if thinking.temperature == 0:
            raise ValueError("at temperature 0 all traces of a group are the same")
        if thinking.top_p < 1 or thinking.top_k:
            name, all_tokens = ("top_k", 0) if thinking.top_k else ("top_p", 1)
            raise ValueError(
                f"thinking.{name} {getattr(thinking, name):g} cuts the distribution that tokens are drawn "
                f"from, and RL trains the whole one; set {name} to {all_tokens} in this stage's thinking"
            )


class DistillStage(Stage):
    """Samples traces and keeps right, well-formed ones for an SFT stage (`data: {source: distilled}`).

    Rejection sampling as in NPR (arXiv 2512.07461) and in ThreadWeaver's self-training (arXiv 2512.07843). It
    trains nothing: the next stage starts from the weights that this one sampled with, or from an earlier
    stage's (`start_from`).
    """

    kind: Literal["distill"]
    """Stage: distillation of own traces."""
    data: ProblemSource
    """Problems to solve."""
    prompts_per_step: Count
    """Problems of a step."""
    samples_per_prompt: Count = 8
    """Traces sampled for each problem."""
    max_concurrent_rollouts: Count = 512
    """Most traces in flight."""
    check: Check = Check()
    """Conditions under which a trace is kept."""
    balance: Balance = Balance()
    """Balancing of the kept traces."""
    shown: CountOrZero = 3
    """Examples of each reason for rejection in the report."""

    @property
    def step_size(self) -> int:
        """Traces of a step."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def samples_traces(self) -> bool:
        return True

    def check_thinking(self, thinking: Thinking) -> None:
        if thinking.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError("at temperature 0 all traces of a problem are the same")


AnyStage = SftStage | RlStage | DistillStage
