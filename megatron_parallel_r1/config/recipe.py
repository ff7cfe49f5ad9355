"""A recipe: all settings of a run, validated once when it is read.

The same file, with every default filled in, is written into the run folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, ValidationInfo, model_validator

from megatron_parallel_r1.config.data import Decontamination, ProblemSource, Tokenizer
from megatron_parallel_r1.config.model import ModelSource
from megatron_parallel_r1.config.rollout import Rollout
from megatron_parallel_r1.config.stages import Name, RlStage, SftStage, Stage
from megatron_parallel_r1.data.prompts import template_text
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.utils.settings import Count, Settings, Tokens, Unit, first_problem


class Evaluation(Settings):
    """Accuracy on problems that no stage trains on."""

    data: ProblemSource
    """Problems to evaluate on."""
    problems: Count = 512
    """Number of problems."""
    samples_per_problem: Count = 1
    """Traces sampled for each problem."""
    max_concurrent_rollouts: Count = 512
    """Most traces in flight."""


class Wandb(Settings):
    """Weights & Biases."""

    project: str
    """Name of the project."""
    entity: str | None = None
    """User or team; null: the account's default."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes files that `wandb sync` uploads later."""


# Names that a run folder uses itself.
RESERVED = (
    "release",
    "servers",
    "tokenizer",
    "config.yaml",
    "stages.json",
    "seeds.json",
    "state.json",
    "run.lock",
    "eval.jsonl",
    "report.html",
)
Seed = Annotated[int, Field(ge=0)]


class Recipe(Settings):
    """One run."""

    name: Name
    """Name of the run and of its folder."""
    seed: Seed = 0
    """Seed from which all others are derived."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None
    """Repeat the run once for each of these seeds, each in a folder of its own; null: one run with `seed`."""
    out: Path = Path("runs")
    """Folder that holds the run's folder."""
    start_run: Path | None = None
    """Folder of another run, from whose finished stages this run's start where it has not trained them;
    `submit --sweep` sets it. null: none."""
    model: ModelSource
    """Model to train."""
    tokenizer: Tokenizer
    """Tokenizer of the model."""
    prompt_template: str = "plain"
    """Template of the question: `plain`, `sequential`, `parallel` or `adaptive` (`data/prompts.py`), or a
    text with `{problem}` in it; `{level}` shows the column `level` of the data, `{{level}}` just braces."""
    thinking: Thinking = Thinking()
    """How traces are decoded, in training, evaluation and the release."""
    max_tokens_per_micro_batch: Tokens = 4096
    """Capacity of a packed row; a longer trace has a row of its own."""
    max_prompt_tokens: Tokens | None = None
    """Longest prompt that is trained on; longer ones are dropped and counted. null: no limit."""
    max_example_tokens: Tokens | None = None
    """Longest row of a worked example, what `replay` repeats included; longer ones are dropped and counted.
    null: no limit."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model is split over processes; it may change when a run is resumed."""
    rollout: Rollout = Rollout()
    """Engine that samples the responses."""
    collective_timeout_s: Annotated[int, Field(ge=1), Unit("seconds")] = 1800
    """Longest wait of one process for another before the run ends."""
    stages: Annotated[
        tuple[Annotated[SftStage | RlStage, Field(discriminator="kind")], ...], Field(min_length=1)
    ]
    """Training stages, in order."""
    evaluation: Evaluation | None = None
    """Evaluation of stages that ask for it, and of the release; null: none."""
    decontamination: Decontamination | None = None
    """Removal of training problems that overlap with evaluation problems; null: none."""
    wandb: Wandb | None = None
    """Logging to Weights & Biases; null: none."""
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of rank 0's host at which Prometheus finds the run's metrics under `/metrics`; null: none."""

    @model_validator(mode="after")
    def _check_settings(self) -> Recipe:
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice in `seeds`")
        try:
            template_text(self.prompt_template)
        except UserError as error:
            raise ValueError(str(error)) from None
        if self.thinking.format != "parallel_r1" and self.prompt_template in ("parallel", "adaptive"):
            raise ValueError(
                f"prompt_template {self.prompt_template} describes the tags of parallel_r1, and "
                "thinking.format is another; write a text of your own with {problem} in it, or use plain"
            )
        return self

    @model_validator(mode="after")
    def _check_stages(self, info: ValidationInfo) -> Recipe:
        names: list[str] = []
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
            if self.rollout.colocated and isinstance(stage, RlStage) and stage.max_off_policy_steps:
                raise ValueError(
                    f"stage {stage.name}: max_off_policy_steps draws while the trainer learns, but colocated "
                    "servers sleep then; set it to 0 or rollout.colocated to false"
                )
            thinking = self.thinking_of(stage)
            if thinking.format != self.thinking.format:
                raise ValueError(
                    f"stage {stage.name}: thinking.format is one for the whole run, whose tokenizer has its "
                    "tags; set it in the recipe's thinking"
                )
            try:
                if info.context is None or info.context.get("trains", True):
                    stage.check_thinking(thinking)
            except ValueError as error:
                raise ValueError(f"stage {stage.name}: {error}") from None
            names.append(stage.name)
        return self

    def thinking_of(self, stage: Stage) -> Thinking:
        """The recipe's settings with the stage's on top."""
        try:
            return self.thinking.replace(**stage.thinking)
        except ValidationError as error:
            raise ValueError(
                f"stage {stage.name}: {first_problem(error, Thinking, inside='thinking')}"
            ) from None

    def keeps_checkpoints(self, stage: Stage) -> bool:
        """Whether its checkpoints are kept when the stage is done."""
        carried = any(other.carry_optimizer and self.start_of(other) == stage.name for other in self.stages)
        return bool(stage.keep_best) or carried

    def start_of(self, stage: Stage) -> str | None:
        """The stage whose weights `stage` begins with; None: the model itself."""
        names = [other.name for other in self.stages]
        place = names.index(stage.name)
        return stage.start_from or (names[place - 1] if place else None)

    def start_folder(self, run: Path, stage: str) -> Path:
        """The folder of a finished stage that another one starts from: that of the run, or of `start_run`."""
        own = run / stage
        return own if self.start_run is None or (own / "model").is_dir() else self.start_run / stage

    def yaml(self) -> str:
        """The whole recipe, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
