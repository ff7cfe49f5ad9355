"""A recipe: everything that a run is told, typed, validated once when it is read.

The same file, with every default filled in, is written into the run folder.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from megatron_parallel_r1.config.data import (
    Count,
    Decontamination,
    ProblemSource,
    Strict,
    Tokenizer,
)
from megatron_parallel_r1.config.errors import first_problem
from megatron_parallel_r1.config.model import Model
from megatron_parallel_r1.config.rollout import Rollout
from megatron_parallel_r1.config.stages import Name, RlStage, SftStage, Stage
from megatron_parallel_r1.data.prompts import TEMPLATES
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.run.early_stopping import WATCHABLE


class Evaluation(Strict):
    """Plain accuracy on problems that no stage trains on."""

    data: ProblemSource
    problems: Count = 512
    samples_per_problem: Count = 1
    max_concurrent_rollouts: Count = 512


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
        max_tokens_per_micro_batch: tokens of a packed row at most; a longer trace has a row of its own.
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
    prompt_template: str = "plain"
    thinking: Thinking = Thinking()
    max_tokens_per_micro_batch: Count = 4096
    max_prompt_tokens: Count | None = None
    max_example_tokens: Count | None = None
    parallel: ParallelConfig = ParallelConfig()
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
        if self.prompt_template not in TEMPLATES:
            raise ValueError(
                f"prompt_template {self.prompt_template!r} is no template, use one of {', '.join(TEMPLATES)}"
            )
        for stage in self.stages:
            if stage.name in names:
                raise ValueError(f"two stages are called {stage.name}")
            if stage.name in RESERVED:
                raise ValueError(f"a stage cannot be called {stage.name}, the run folder uses that name")
            if stage.start_from is not None and stage.start_from not in names:
                raise ValueError(
                    f"stage {stage.name} starts from {stage.start_from}, which is no stage before it"
                )
            if stage.evaluate and self.evaluation is None:
                raise ValueError(
                    f"stage {stage.name} wants an evaluation, but the recipe has no `evaluation`"
                )
            if stage.carry_optimizer and not names:
                raise ValueError(f"stage {stage.name} is the first: there is no optimizer to carry over")
            if stage.early_stopping and stage.early_stopping.metric not in WATCHABLE[stage.kind]:
                raise ValueError(
                    f"stage {stage.name}: early_stopping.metric {stage.early_stopping.metric!r} is none of "
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
        return stage.start_from or (names[place - 1] if place else None)

    def yaml(self) -> str:
        """The whole recipe, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
