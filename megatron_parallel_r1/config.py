"""A recipe: everything that a run is told, typed, validated once when it is read.

The same file, with every default filled in, is written into the run folder.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from megatron_parallel_r1.data.prompts import TEMPLATES
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.parallel import Parallel
from megatron_parallel_r1.recipe_data import (
    BpeTokenizer as BpeTokenizer,
)
from megatron_parallel_r1.recipe_data import (
    Count,
    Decontamination,
    ExampleSource,
    ProblemSource,
    Share,
    Strict,
    Tokenizer,
)
from megatron_parallel_r1.recipe_data import (
    DataSet as DataSet,
)
from megatron_parallel_r1.recipe_data import (
    EmbeddedArithmetic as EmbeddedArithmetic,
)
from megatron_parallel_r1.recipe_data import (
    EmbeddedColdStart as EmbeddedColdStart,
)
from megatron_parallel_r1.recipe_data import (
    EmbeddedProblems as EmbeddedProblems,
)
from megatron_parallel_r1.recipe_data import (
    EmbeddedTokenizer as EmbeddedTokenizer,
)
from megatron_parallel_r1.recipe_data import (
    FolderTokenizer as FolderTokenizer,
)
from megatron_parallel_r1.recipe_errors import first_problem
from megatron_parallel_r1.recipe_model import Model as Model
from megatron_parallel_r1.recipe_model import Shape as Shape
from megatron_parallel_r1.recipe_rollout import Rollout
from megatron_parallel_r1.rewards import base as rewards
from megatron_parallel_r1.rewards.registry import make_component, make_reward
from megatron_parallel_r1.rewards.weights import ONE, Constant, Linear, Window
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.train.plateau import WATCHABLE, Plateau
from megatron_parallel_r1.train.policy.filtering import Dynamic
from megatron_parallel_r1.train.policy.objective import Objective

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Strict):
    """AdamW; the rate rises over `warmup` steps and then falls linearly to `final` x `lr`.

    A larger `eps` holds parameters still whose gradient is mere noise, such as rows of unused tokens.
    """

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    warmup: Annotated[int, Field(ge=0)] = 0
    final: Share = 1.0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(ge=0)] = 1.0


class Stage(Strict):
    """What all stages have.

    Attributes:
        start: the stage whose weights it begins with; None: the stage before it, or the model.
        thinking: settings that differ from the recipe's.
        carry_optimizer: begin with the optimizer's state of the stage before, not with a fresh one.
        until: end before `steps` when a metric rises no more.
        evaluate: whether to evaluate when the stage is done.
        save_every: steps between two checkpoints.
        keep_last: how many of them are kept.
        keep_best: keep also the one of the best score (`curriculum.loop.SCORES`), beyond the stage's end.
        max_bad_steps: steps in a row whose loss or gradient is not finite that end the run; each is left out.
    """

    name: Name
    start: Name | None = None
    steps: Count
    optimizer: Optimizer
    thinking: dict[str, Any] = Field(default_factory=dict)
    carry_optimizer: bool = False
    until: Plateau | None = None
    evaluate: bool = False
    save_every: Count = 50
    keep_last: Count = 2
    keep_best: bool = False
    max_bad_steps: Count = 3


class SftStage(Stage):
    """Supervised: `batch` worked examples a step, trained under the layout of the thinking mode."""

    kind: Literal["sft"]
    data: ExampleSource
    batch: Count


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

    A name or a term may be `module:function` (rewards/user.py).
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
    """GRPO: `samples` traces of each of `prompts` problems a step.

    Attributes:
        epochs, mini_batches: the traces of a step are gone through `epochs` times, in `mini_batches` updates
            each.
        objective: advantage, loss and corrections.
        dynamic: dynamic sampling; None: every group is trained.
        max_staleness: traces are rolled out by weights up to so many updates old, while earlier traces train;
            0: in turn.
        partial: with a `max_staleness`, traces under way take newer weights; no two runs are then the same.
        reference_every: after so many steps the reference of a KL term takes the trained weights; 0: it stays
            the policy that the stage began with.
        concurrent: traces in flight at most.
        keep_traces: traces of each step that are kept for the report.
    """

    kind: Literal["rl"]
    data: ProblemSource
    prompts: Count
    samples: Annotated[int, Field(ge=2)]
    reward: Reward = Reward()
    epochs: Count = 1
    mini_batches: Count = 1
    objective: Objective = Objective()
    dynamic: Dynamic | None = None
    max_staleness: Annotated[int, Field(ge=0)] = 0
    partial: bool = False
    reference_every: Annotated[int, Field(ge=0)] = 0
    concurrent: Count = 512
    keep_traces: Annotated[int, Field(ge=0)] = 2

    @model_validator(mode="after")
    def _divisible(self) -> RlStage:
        if self.mini_batches > self.prompts:
            raise ValueError(
                f"{self.mini_batches} mini-batches need as many prompts, there are {self.prompts}"
            )
        if self.reference_every and self.objective.kl == "none":
            raise ValueError("reference_every: there is no reference without objective.kl")
        if self.partial and not self.max_staleness:
            raise ValueError("partial: traces meet newer weights only with a max_staleness of 1 at least")
        return self


class Evaluation(Strict):
    """Plain accuracy on problems that no stage trains on."""

    data: ProblemSource
    count: Count = 512
    samples: Count = 1
    concurrent: Count = 512


class Wandb(Strict):
    """Weights & Biases; `offline` writes what `wandb sync` uploads later."""

    project: str
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


# Names that a run folder uses itself.
RESERVED = (
    "release",
    "servers",
    "tokenizer",
    "config.yaml",
    "stages.json",
    "seeds.json",
    "eval.jsonl",
    "report.html",
)
Seed = Annotated[int, Field(ge=0)]


class Recipe(Strict):
    """One run. `seeds` repeats it from several seeds, each in a folder of its own.

    Attributes:
        micro_tokens: tokens of a packed row at most; a single trace that is longer has one for itself.
        max_prompt_tokens: problems of a data set whose prompt is longer are not trained on; None: all are.
        max_example_tokens: nor worked examples whose laid-out row is, what `replay` repeats included.
        parallel: how the model is split over processes; it may change when a run goes on.
        rollout: who draws the tokens.
        collective_timeout_s: a process that waits longer for another ends the run.
    """

    name: Name
    seed: Seed = 0
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None
    out: Path = Path("runs")
    model: Model
    tokenizer: Tokenizer
    prompt: str = "plain"
    thinking: Thinking = Thinking()
    micro_tokens: Count = 4096
    max_prompt_tokens: Count | None = None
    max_example_tokens: Count | None = None
    parallel: Parallel = Parallel()
    rollout: Rollout = Rollout()
    collective_timeout_s: Count = 1800
    stages: Annotated[
        tuple[Annotated[SftStage | RlStage, Field(discriminator="kind")], ...], Field(min_length=1)
    ]
    evaluation: Evaluation | None = None
    decontamination: Decontamination | None = None
    wandb: Wandb | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names: list[str] = []
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice in `seeds`")
        if self.prompt not in TEMPLATES:
            raise ValueError(f"prompt {self.prompt!r} is no template, use one of {', '.join(TEMPLATES)}")
        for stage in self.stages:
            if stage.name in names:
                raise ValueError(f"two stages are called {stage.name}")
            if stage.name in RESERVED:
                raise ValueError(f"a stage cannot be called {stage.name}, the run folder uses that name")
            if stage.start is not None and stage.start not in names:
                raise ValueError(f"stage {stage.name} starts from {stage.start}, which is no stage before it")
            if stage.evaluate and self.evaluation is None:
                raise ValueError(
                    f"stage {stage.name} wants an evaluation, but the recipe has no `evaluation`"
                )
            if stage.carry_optimizer and not names:
                raise ValueError(f"stage {stage.name} is the first: there is no optimizer to carry over")
            if stage.until and stage.until.metric not in WATCHABLE[stage.kind]:
                raise ValueError(
                    f"stage {stage.name}: until.metric {stage.until.metric!r} is none of "
                    f"{', '.join(WATCHABLE[stage.kind])}"
                )
            thinking = self.thinking_of(stage)
            if isinstance(stage, RlStage) and stage.objective.overlong_cache > thinking.max_response_tokens:
                raise ValueError(
                    f"stage {stage.name}: overlong_cache {stage.objective.overlong_cache} is more than the "
                    f"{thinking.max_response_tokens} tokens of a response"
                )
            if isinstance(stage, RlStage) and thinking.temperature == 0:
                raise ValueError(f"stage {stage.name}: at temperature 0 all traces of a group are the same")
            names.append(stage.name)
        return self

    def thinking_of(self, stage: Stage) -> Thinking:
        """The recipe's settings with the stage's on top."""
        merged = asdict(self.thinking) | stage.thinking
        try:
            return TypeAdapter(Thinking).validate_python(merged)
        except ValidationError as error:
            raise ValueError(f"stage {stage.name}: {first_problem(error, 'thinking')}") from None

    def keeps_checkpoints(self, stage: Stage) -> bool:
        """Whether they are of use when the stage is done."""
        carried = any(other.carry_optimizer and self.start_of(other) == stage.name for other in self.stages)
        return stage.keep_best or carried

    def start_of(self, stage: Stage) -> str | None:
        """The stage whose weights `stage` begins with; None: the model itself."""
        names = [other.name for other in self.stages]
        place = names.index(stage.name)
        return stage.start or (names[place - 1] if place else None)

    def yaml(self) -> str:
        """The whole recipe, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
