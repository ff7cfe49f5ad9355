"""What a recipe will do and what it will take on so many processes, before anything is downloaded.

Token counts are upper bounds, reached where every trace is as long as its limits let it be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

import torch

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.config.data import BpeTokenizer
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.stages import RlStage, SftStage
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig, check_parallel
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.planning.machine import H100, Machine
from megatron_parallel_r1.planning.memory import MemoryUse, Workload, memory_use
from megatron_parallel_r1.planning.published import published_config
from megatron_parallel_r1.planning.rollouts import LengthLimits, longest_response, longest_row
from megatron_parallel_r1.planning.split import PipelinePart, pipeline_parts
from megatron_parallel_r1.planning.step_time import StepTime, Timing
from megatron_parallel_r1.rollout.native import limits
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.run.datasets import load_tokenizer
from megatron_parallel_r1.thought.layout import Mode
from megatron_parallel_r1.thought.tags import TAG_TEXTS
from megatron_parallel_r1.thought.tokenizer import add_tags

GIB = 2**30


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage on every process.

    Attributes:
        stage: as the recipe has it.
        start: whose weights it begins with; None: the model's.
        rows: examples or traces that a step trains on.
        drawn: tokens of all responses of a step at most; 0 for SFT.
        trained: tokens of the rows of a step at most, prompts and branches included.
        updates: optimizer steps a step.
        micro_batches: of each copy in an update, where every row has its full length.
        row: tokens of the longest packed row.
        slots: of the engine's cache at most; None: no engine decodes in process.
        memories: of a process of each pipeline rank.
        evaluation: of a process while it evaluates the stage in process; None: it does not.
        time: of a step on the plan's machine.
    """

    stage: SftStage | RlStage
    mode: Mode
    start: str | None
    rows: int
    drawn: int
    trained: int
    updates: int
    micro_batches: int
    row: int
    slots: int | None
    memories: tuple[MemoryUse, ...]
    evaluation: MemoryUse | None
    time: StepTime

    @property
    def fullest(self) -> int:
        """The pipeline rank whose processes need most."""
        totals = [each.total for each in self.memories]
        return totals.index(max(totals))


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe on `world` processes.

    Attributes:
        parts: what the processes of each pipeline rank hold.
        data: copies of the model.
        gpu: bytes of memory that each process has.
        machine: by whose rates times are told.
        notes: what was assumed, and what will not work, a line each.
    """

    recipe: Recipe
    shape: ModelConfig
    parallel: ParallelConfig
    world: int
    data: int
    pipeline_parts: tuple[PipelinePart, ...]
    stages: tuple[StagePlan, ...]
    gpu: int
    machine: Machine
    notes: tuple[str, ...]


def plan(
    recipe: Recipe,
    world: int = 1,
    gpu: int = 80 * GIB,
    longest: LengthLimits | None = None,
    machine: Machine = H100,
) -> Plan:
    """Plans a recipe; reads no data and no weights, and starts no process group.

    Args:
        world: processes, one a GPU.
        gpu: bytes of memory of each.
        longest: prompts and examples to reckon with.
        machine: that runs it.

    Raises:
        UserError: the model's folder or tokenizer is missing, or something does not divide.
    """
    longest, assumed = _bounded(longest or LengthLimits(), recipe)
    parallel = recipe.parallel
    shape, notes = _shape(recipe)
    check_parallel(shape, parallel, world, recipe.max_tokens_per_micro_batch)
    pieces = pipeline_parts(shape, parallel)
    data = world // parallel.replica_size
    in_process = recipe.rollout.engine == "native"
    if in_process and any(isinstance(stage, RlStage) or stage.evaluate for stage in recipe.stages):
        try:
            limits.refuse(parallel.pipeline, parallel.context)
        except UserError as refused:
            in_process = False
            notes.append(f"a run would end with: {refused}")
    planner = _Planner(recipe, shape, pieces, data, longest, in_process, machine)
    stages = tuple(planner.stage(stage) for stage in recipe.stages)
    notes += [
        *assumed,
        *(note for stage in stages for note in _warnings(stage, recipe, shape, data, gpu)),
    ]
    if recipe.rollout.engine != "native":
        servers, tensor = planner.timing.engines, recipe.rollout.tensor
        notes.append(f"times are told for {servers} servers of {_gpus(tensor)} each")
    return Plan(recipe, shape, parallel, world, data, pieces, stages, gpu, machine, tuple(notes))


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def _shape(recipe: Recipe) -> tuple[ModelConfig, list[str]]:
    """The model's shape, and what had to be assumed of it."""
    told = recipe.model
    if told.path is not None:
        shape, read = published_config(told.path)
        note = f"{told.path} is not here: the shape is that of the published {told.path.name}"
        return shape, [] if read else [note]
    if isinstance(recipe.tokenizer, BpeTokenizer):
        vocab = recipe.tokenizer.vocab_size + len(TAG_TEXTS)
        return told.shape.config(vocab), ["few texts may give the tokenizer a smaller vocabulary"]
    tokenizer = load_tokenizer(recipe)
    add_tags(tokenizer)
    return told.shape.config(len(tokenizer)), []


@dataclass(frozen=True, slots=True)
class _Planner:
    recipe: Recipe
    shape: ModelConfig
    pipeline_parts: tuple[PipelinePart, ...]
    data: int
    longest: LengthLimits
    in_process: bool
    machine: Machine

    @property
    def timing(self) -> Timing:
        return Timing(self.recipe, self.shape, self.parts, self.data, self.machine)

    def stage(self, stage: SftStage | RlStage) -> StagePlan:
        thinking = self.recipe.thinking_of(stage)
        if isinstance(stage, RlStage):
            rows, longest = (
                stage.prompts_per_step * stage.samples_per_prompt,
                longest_row(thinking, self._prompt(thinking)),
            )
            rounds, asked = _asked(stage)
            drawn = rounds * asked * stage.samples_per_prompt * longest_response(thinking)
            updates = stage.epochs * stage.mini_batches
            together = ceil(stage.prompts_per_step / stage.mini_batches) * stage.samples_per_prompt
            trained = stage.epochs * rows * longest
            slots = self._slots(asked, stage.samples_per_prompt, stage.max_concurrent_rollouts, thinking)
            reference = stage.objective.kl != "none"
        else:
            rows = together = stage.examples_per_step
            longest = min(
                self.longest.example, self.shape.max_positions, self.recipe.max_tokens_per_micro_batch
            )
            drawn, updates, trained, slots, reference = 0, 1, rows * longest, None, False
            rounds, asked = 0, 0
        staleness = stage.max_off_policy_steps if isinstance(stage, RlStage) else 0
        micro_batches = self._micro_batches(together, longest)
        work = Workload(self._packed(longest), micro_batches, slots, reference, staleness)
        return StagePlan(
            stage=stage,
            mode=thinking.mode,
            start=self.recipe.start_of(stage),
            rows=rows,
            drawn=drawn,
            trained=trained,
            updates=updates,
            micro_batches=work.micro_batches,
            row=work.row,
            slots=slots,
            memories=tuple(self._memory(part, work) for part in self.parts),
            evaluation=self._evaluation(thinking) if stage.evaluate and self.in_process else None,
            time=self.timing.of(
                stage,
                thinking,
                work,
                longest,
                updates,
                trained / updates,
                rounds * asked,
                self._prompt(thinking),
            ),
        )

    def _memory(self, part: PipelinePart, work: Workload) -> MemoryUse:
        number = getattr(torch, self.recipe.model.dtype).itemsize
        return memory_use(self.shape, self.recipe.parallel, part, self.data, number, work)

    def _evaluation(self, thinking: Thinking) -> MemoryUse:
        """The stage's trainer is still there, idle, beside an engine for the evaluation's traces."""
        asked = self.recipe.evaluation
        slots = self._slots(
            asked.problems, asked.samples_per_problem, asked.max_concurrent_rollouts, thinking
        )
        idle = Workload(row=0, micro_batches=0, slots=slots)
        return replace(self._memory(self.parts[0], idle), activations=0, logits=0)

    def _prompt(self, thinking: Thinking) -> int:
        return max(1, min(self.longest.prompt, self.shape.max_positions - longest_response(thinking)))

    def _micro_batches(self, rows: int, longest: int) -> int:
        """Of one copy, where `rows` of full length are dealt to all; interleaved stages take turns."""
        in_one = max(1, self.recipe.max_tokens_per_micro_batch // longest)
        count = ceil(ceil(rows / self.data) / in_one)
        parallel = self.recipe.parallel
        return count + -count % (parallel.pipeline if parallel.virtual > 1 else 1)

    def _packed(self, longest: int) -> int:
        """Tokens of a packed row at most; a row longer than `max_tokens_per_micro_batch` stands alone."""
        most = max(self.recipe.max_tokens_per_micro_batch, longest)
        multiple = self.recipe.parallel.row_multiple * self.recipe.model.made_of.row_multiple
        return most + -most % multiple

    def _slots(self, prompts: int, samples: int, concurrent: int, thinking: Thinking) -> int | None:
        """Of a copy's cache at most: its prompts stay to the end, and so many traces are in flight."""
        if not self.in_process:
            return None
        traces, most = prompts * samples, 0
        prompt, trace = self._prompt(thinking), longest_row(thinking, 0)
        for rank in range(self.data):
            first, end = traces * rank // self.data, traces * (rank + 1) // self.data
            own = (end - 1) // samples - first // samples + 1 if end > first else 0
            most = max(most, own * prompt + min(concurrent, end - first) * trace)
        return most


def _asked(stage: RlStage) -> tuple[int, int]:
    """Rounds of rollouts in a step, and problems in each, at most."""
    if stage.dynamic_sampling is None:
        return 1, stage.prompts_per_step
    return stage.dynamic_sampling.max_rounds, ceil(
        stage.dynamic_sampling.oversampling * stage.prompts_per_step
    )


def _bounded(longest: LengthLimits, recipe: Recipe) -> tuple[LengthLimits, list[str]]:
    """What to reckon with where the recipe bounds it too, and a note on what it does not bound so low."""
    prompt, example = recipe.max_prompt_tokens, recipe.max_example_tokens
    kinds = {stage.kind for stage in recipe.stages}
    known = (("rl", "prompts", longest.prompt, prompt), ("sft", "SFT rows", longest.example, example))
    assumed = [
        f"{what} of up to {most:,} tokens"
        for kind, what, most, bound in known
        if kind in kinds and (bound is None or bound > most)
    ]
    note = (
        f"assumed, since the recipe allows longer ones: {' and '.join(assumed)}, or what the model's "
        "positions (and max_tokens_per_micro_batch) have room for"
    )
    bounded = LengthLimits(
        min(longest.prompt, prompt or longest.prompt), min(longest.example, example or longest.example)
    )
    return bounded, [note] if assumed else []


def _warnings(made: StagePlan, recipe: Recipe, shape: ModelConfig, data: int, gpu: int) -> Iterator[str]:
    """What about a stage does not fit."""
    stage, need = made.stage, made.memories[made.fullest].total
    if need > gpu:
        lower = "max_tokens_per_micro_batch"
        if made.slots is not None:
            lower = f"its max_concurrent_rollouts ({stage.max_concurrent_rollouts}) or {lower}"
        yield (
            f"stage {stage.name}: about {need / GIB:.0f} GiB are needed, a GPU has {gpu / GIB:.0f}; "
            f"lower {lower}, recompute more, or split over more processes"
        )
    if made.evaluation is not None and (need := made.evaluation.total) > gpu:
        yield (
            f"stage {stage.name}: its evaluation needs about {need / GIB:.0f} GiB, a GPU has "
            f"{gpu / GIB:.0f}; lower "
            f"evaluation.max_concurrent_rollouts ({recipe.evaluation.max_concurrent_rollouts})"
        )
    if made.row > recipe.max_tokens_per_micro_batch:
        yield (
            f"stage {stage.name}: a row may have {made.row:,} tokens; one longer than "
            f"max_tokens_per_micro_batch ({recipe.max_tokens_per_micro_batch:,}) stands alone, "
            "and memory is reckoned for it"
        )
    response = longest_response(recipe.thinking_of(stage))
    if response >= shape.max_positions:
        yield (
            f"stage {stage.name}: a response may have {response:,} tokens, the model was made for "
            f"{shape.max_positions:,}"
        )
    together = made.rows // (stage.mini_batches if isinstance(stage, RlStage) else 1)
    if together < data:
        yield f"stage {stage.name}: {together} rows an update leave some of {data} copies idle"
