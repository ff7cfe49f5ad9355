"""A recipe: all settings of a run, validated once when it is read.

The same file, with every default filled in, is written into the run folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, ValidationInfo, model_validator

from megatron_parallel_r1.config.data import Decontamination, DistilledTraces, Tokenizer
from megatron_parallel_r1.config.evaluation import Evaluation, EvaluationSet
from megatron_parallel_r1.config.model import ModelSource
from megatron_parallel_r1.config.rollout import Rollout
from megatron_parallel_r1.config.stages import (
    AnyStage,
    DistillStage,
    Name,
    RlStage,
    SftStage,
    Stage,
    TrainingStage,
)
from megatron_parallel_r1.data.prompts import template_text
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.modes import Decoding, EvaluationMode, decoding_of
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.utils.settings import Settings, Tokens, Unit, first_problem


class Wandb(Settings):
    """Weights & Biases."""

    project: str
    """Name of the project."""
    entity: str | None = None
    """User or team; null: the account's default."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes files that `wandb sync` uploads later."""
    id: str | None = None
    """ID of a run of yours to continue; null: this run has one of its own, for all its stages."""


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
    "wandb",
)
# What a finished stage leaves in its folder: one that trains a model, one that distils traces.
MODEL, TRACES = "model", "traces.parquet"
Seed = Annotated[int, Field(ge=0)]


def is_finished(stage_folder: Path) -> bool:
    """Returns whether the folder has what its stage leaves at its end: a model, or traces."""
    return (stage_folder / MODEL).is_dir() or (stage_folder / TRACES).is_file()


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
        tuple[Annotated[AnyStage, Field(discriminator="kind")], ...],
        Field(min_length=1),
    ]
    """Stages, in order."""
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
        trains = info.context is None or info.context.get("trains", True)
        for place, stage in enumerate(self.stages):
            try:
                self._check_stage(stage, self.stages[:place], trains)
            except ValueError as error:
                raise ValueError(f"stage {stage.name}: {error}") from None
        if not self.trained_stages:
            raise ValueError("no stage trains; add one of kind sft or rl")
        return self

    def _check_stage(self, stage: AnyStage, before: tuple[Stage, ...], trains: bool) -> None:
        """Checks a stage against the recipe and the stages before it; raises ValueError."""
        kinds = {other.name: other.kind for other in before}
        if stage.name in kinds:
            raise ValueError("another stage has that name")
        if stage.name in RESERVED:
            raise ValueError("the run folder uses that name itself; choose another")
        if stage.start_from is not None and kinds.get(stage.start_from, "distill") == "distill":
            raise ValueError(f"starts from {stage.start_from}, which is no stage before it that trains")
        if isinstance(stage.data, DistilledTraces) and kinds.get(stage.data.stage) != "distill":
            raise ValueError(f"data: {stage.data.stage} is no distill stage before it")
        if isinstance(stage, TrainingStage):
            if stage.evaluate and self.evaluation is None:
                raise ValueError("wants an evaluation, but the recipe has no `evaluation`")
            if stage.carry_optimizer and self.start_of(stage) is None:
                raise ValueError("it is the first: there is no optimizer to carry over")
            self._check_evaluation_sets(stage)
        if self.rollout.colocated and isinstance(stage, RlStage) and stage.max_off_policy_steps:
            raise ValueError(
                "max_off_policy_steps draws while the trainer learns, but colocated servers sleep then; set "
                "it to 0 or rollout.colocated to false"
            )
        thinking = self.thinking_of(stage)
        if thinking.format != self.thinking.format:
            raise ValueError(
                "thinking.format is one for the whole run, whose tokenizer has its tags; set it in the "
                "recipe's thinking"
            )
        if trains:
            stage.check_thinking(thinking)

    def _check_evaluation_sets(self, stage: TrainingStage) -> None:
        for name, settings in stage.evaluation_sets.items():
            try:
                for mode in settings.modes:
                    self.decoding_of(stage, settings, mode)
            except (UserError, ValueError) as error:
                raise ValueError(f"evaluate_during.sets.{name}: {error}") from None

    @property
    def trained_stages(self) -> tuple[SftStage | RlStage, ...]:
        """The stages that train weights, in order; the last one's are released."""
        return tuple(stage for stage in self.stages if not isinstance(stage, DistillStage))

    def thinking_of(self, stage: Stage) -> Thinking:
        """The recipe's settings with the stage's on top."""
        try:
            return self.thinking.replace(**stage.thinking)
        except ValidationError as error:
            raise ValueError(first_problem(error, Thinking, inside="thinking")) from None

    def decoding_of(self, stage: Stage, settings: EvaluationSet, mode: str) -> Decoding:
        """How a set of `stage.evaluate_during` is decoded in one of its modes.

        Raises:
            UserError, ValueError: a setting is invalid or contradicts the mode.
        """
        try:
            thinking = self.thinking_of(stage).replace(**settings.thinking)
        except ValidationError as error:
            raise ValueError(first_problem(error, Thinking, inside="thinking")) from None
        if thinking.mode == "sequential" and mode == "parallel":
            raise ValueError("modes: the stage decodes sequentially; write `modes: [sequential]`")
        if thinking.temperature == 0 and settings.samples_per_problem > 1:
            raise ValueError("at temperature 0 all samples of a problem are the same; draw one")
        return decoding_of(EvaluationMode.of(mode), Decoding(thinking, template_text(self.prompt_template)))

    def evaluations(self) -> dict[str, Evaluation]:
        """All evaluations, by the recipe key that they stand under."""
        own = {"evaluation": self.evaluation} if self.evaluation else {}
        return own | {
            f"stage {stage.name}, evaluate_during.sets.{name}": settings
            for stage in self.trained_stages
            for name, settings in stage.evaluation_sets.items()
        }

    def keeps_checkpoints(self, stage: TrainingStage) -> bool:
        """Whether its checkpoints are kept when the stage is done."""
        carried = any(
            other.carry_optimizer and self.start_of(other) == stage.name for other in self.trained_stages
        )
        return bool(stage.keep_best) or carried

    def start_of(self, stage: Stage) -> str | None:
        """The stage whose weights `stage` begins with; None: the model itself."""
        if stage.start_from is not None:
            return stage.start_from
        names = [other.name for other in self.stages]
        before = self.stages[: names.index(stage.name)]
        trained = [other.name for other in before if isinstance(other, TrainingStage)]
        return trained[-1] if trained else None

    def needs_of(self, stage: AnyStage) -> tuple[str, ...]:
        """The stages that must be finished before `stage`: for its weights, and for its data."""
        start = self.start_of(stage)
        data = stage.data.stage if isinstance(stage.data, DistilledTraces) else None
        return tuple(name for name in (start, data) if name is not None)

    def work_after(self, stage: AnyStage) -> float | None:
        """The steps of all later stages in steps of this one, by their sizes; None if kinds differ."""
        later = self.stages[[other.name for other in self.stages].index(stage.name) + 1 :]
        if any(other.kind != stage.kind for other in later):
            return None
        return sum(other.steps * other.step_size / stage.step_size for other in later)

    def trained_before(self, stage: Stage) -> tuple[SftStage | RlStage, ...]:
        """The stages whose steps are in the weights that `stage` starts from, in order."""
        by_name = {other.name: other for other in self.trained_stages}
        chain: list[SftStage | RlStage] = []
        before = self.start_of(stage)
        while before is not None:
            chain.insert(0, by_name[before])
            before = self.start_of(by_name[before])
        return tuple(chain)

    def start_folder(self, run: Path, stage: str) -> Path:
        """The folder of a finished stage that another one needs: that of the run, or of `start_run`."""
        own = run / stage
        return own if self.start_run is None or is_finished(own) else self.start_run / stage

    def yaml(self) -> str:
        """The whole recipe, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
