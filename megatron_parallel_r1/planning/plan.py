"""Predicts what a recipe does and needs on a number of ranks, before anything is downloaded.

Token counts are upper bounds, reached if every trace has its maximum length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, prod

import torch

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import weight_table
from megatron_parallel_r1.config.data import BpeTokenizer
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.rollout import Rollout
from megatron_parallel_r1.config.stages import RlStage, SftStage
from megatron_parallel_r1.distributed.parallel_config import (
    ParallelConfig,
    check_native_split,
    check_parallel,
)
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.planning.machine import H100, Machine
from megatron_parallel_r1.planning.memory import MemoryUse, PipelinePart, Workload, memory_use, pipeline_parts
from megatron_parallel_r1.planning.published import published_config
from megatron_parallel_r1.planning.rollouts import LengthLimits, longest_response, longest_row
from megatron_parallel_r1.planning.step_time import StepTime, Timing
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.run.datasets import load_tokenizer
from megatron_parallel_r1.thought.format_settings import format_of
from megatron_parallel_r1.thought.layout import Mode
from megatron_parallel_r1.thought.tokenizer import add_tags
from megatron_parallel_r1.utils.hub import local_folder

GIB = 2**30
# A CUDA context with its libraries, which a sleeping process keeps; an estimate.
CONTEXT = GIB


@dataclass(frozen=True, slots=True)
class StagePlan:
    """The plan of one stage.

    Attributes:
        start: the stage whose weights it starts from; None: the model's.
        rows: examples or traces that a step trains on.
        sampled: most tokens of all responses of a step; 0 for SFT.
        trained: most tokens of the rows of a step, prompts and branches included.
        updates: optimizer steps of a step.
        micro_batches: of each replica in an update, if every row has its maximum length.
        row: tokens of the longest packed row.
        slots: most slots of the engine's cache; None: no engine runs in process.
        memories: of a rank at each pipeline stage.
        evaluation: memory of a rank during an in-process evaluation of the stage; None: there is none.
        time: of a step on the plan's machine.
    """

    stage: SftStage | RlStage
    mode: Mode
    start: str | None
    rows: int
    sampled: int
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
        """The pipeline rank that needs most memory."""
        totals = [each.total for each in self.memories]
        return totals.index(max(totals))


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe on `world` ranks.

    Attributes:
        data: data-parallel replicas.
        gpu: bytes of memory of each rank.
        fits: whether every stage and evaluation fits its GPUs, with servers that are colocated.
        notes: assumptions, and what will not work, a line each.
    """

    recipe: Recipe
    shape: ModelConfig
    parallel: ParallelConfig
    world: int
    data: int
    parts: tuple[PipelinePart, ...]
    stages: tuple[StagePlan, ...]
    gpu: int
    machine: Machine
    fits: bool
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
        world: ranks, one per GPU.
        gpu: bytes of memory of each.
        longest: bounds of prompts and examples where the recipe has none.

    Raises:
        UserError: the model's folder or tokenizer is missing, or something does not divide.
    """
    longest, assumed = _bounded(longest or LengthLimits(), recipe)
    parallel = recipe.parallel
    shape, notes = _shape(recipe)
    check_parallel(shape, parallel, world, recipe.max_tokens_per_micro_batch)
    parts = pipeline_parts(shape, parallel)
    data = world // parallel.replica_size
    in_process = recipe.rollout.engine == "native"
    if in_process and any(stage.samples_traces for stage in recipe.stages):
        try:
            check_native_split(parallel.pipeline, parallel.context)
        except UserError as error:
            in_process = False
            notes.append(f"a run would end with: {error}")
    planner = _Planner(recipe, shape, parts, data, longest, in_process, machine)
    stages = tuple(planner.stage(stage) for stage in recipe.trained_stages)
    needs = [stage.memories[stage.fullest] for stage in stages]
    needs += [stage.evaluation for stage in stages if stage.evaluation is not None]
    fits = all(need.total <= gpu for need in needs)
    notes += [
        *assumed,
        *(note for stage in stages for note in _warnings(stage, recipe, shape, data, gpu)),
    ]
    if recipe.rollout.engine != "native":
        servers, tensor = planner.timing.engines, recipe.rollout.tensor
        notes.append(f"times are for {servers} servers of {_gpus(tensor)} each")
        notes += _own_servers(recipe.rollout, world, machine.per_node)
        turns = [planner.turns(stage, gpu) for stage in stages if isinstance(stage.stage, RlStage)]
        notes += [note for _, note in turns]
        fits &= not recipe.rollout.colocated or all(together for together, _ in turns)
    return Plan(recipe, shape, parallel, world, data, parts, stages, gpu, machine, fits, tuple(notes))


def _own_servers(rollout: Rollout, world: int, per_node: int) -> Iterator[str]:
    """Yields where the servers that a run starts have their GPUs."""
    servers = rollout.servers * rollout.tensor
    if not servers:
        return
    ranks = min(world, per_node) if rollout.colocated else min(world, max(1, per_node - servers))
    try:
        rollout.check_gpus(ranks, per_node)
    except UserError as error:
        yield f"a run would end with: {error}"
        return
    if rollout.colocated:
        yield f"the {rollout.servers} servers of each node share the GPUs of its processes"
        return
    yield (
        f"{rollout.needed_gpus(world)} GPUs: {world} of processes, {servers} of servers, which are on the "
        f"first node beside at most {per_node - servers} processes"
    )


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def _shape(recipe: Recipe) -> tuple[ModelConfig, list[str]]:
    """Returns the model's config, and the assumptions made about it."""
    source, format = recipe.model, format_of(recipe.thinking.format)
    if source.path is not None:
        shape, read = published_config(local_folder(source.path))
        note = f"{source.path} is not on this machine: using the sizes of the published {source.path.name}"
        return shape, [] if read else [note]
    assert source.shape is not None  # the recipe has a path or a shape
    if isinstance(recipe.tokenizer, BpeTokenizer):
        vocab = recipe.tokenizer.vocab_size + len(format.tags)
        return source.shape.config(vocab), ["few texts may give the tokenizer a smaller vocabulary"]
    tokenizer = load_tokenizer(recipe)
    add_tags(tokenizer, format=format)
    return source.shape.config(len(tokenizer)), []


@dataclass(frozen=True, slots=True)
class _Planner:
    recipe: Recipe
    shape: ModelConfig
    parts: tuple[PipelinePart, ...]
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
            rounds, problems = _rollout_rounds(stage)
            sampled = rounds * problems * stage.samples_per_prompt * longest_response(thinking)
            updates = stage.epochs * stage.mini_batches
            together = ceil(stage.prompts_per_step / stage.mini_batches) * stage.samples_per_prompt
            trained = stage.epochs * rows * longest
            slots = self._slots(problems, stage.samples_per_prompt, stage.max_concurrent_rollouts, thinking)
            reference = stage.objective.kl != "none"
        else:
            rows = together = stage.examples_per_step
            longest = min(
                self.longest.example, self.shape.max_positions, self.recipe.max_tokens_per_micro_batch
            )
            sampled, updates, trained, slots, reference = 0, 1, rows * longest, None, False
            rounds, problems = 0, 0
        staleness = stage.max_off_policy_steps if isinstance(stage, RlStage) else 0
        micro_batches = self._micro_batches(together, longest)
        fused = self.recipe.model.fused_swiglu
        work = Workload(self._packed(longest), micro_batches, slots, reference, staleness, fused)
        return StagePlan(
            stage=stage,
            mode=thinking.mode,
            start=self.recipe.start_of(stage),
            rows=rows,
            sampled=sampled,
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
                rounds * problems,
                self._prompt(thinking),
            ),
        )

    def _memory(self, part: PipelinePart, work: Workload) -> MemoryUse:
        number = getattr(torch, self.recipe.model.dtype).itemsize
        return memory_use(self.shape, self.recipe.parallel, part, self.data, number, work)

    def turns(self, planned: StagePlan, gpu: int) -> tuple[bool, str]:
        """Whether servers may share the GPUs of an RL stage, and what the two phases of a step need."""
        recipe, shape, trainer = self.recipe, self.shape, planned.memories[planned.fullest]
        number, size = getattr(torch, recipe.model.dtype).itemsize, recipe.rollout.tensor
        server = number * sum(prod(s) for weight in weight_table(shape) for _, s in weight.parts) // size
        learning = trainer.total + CONTEXT
        drawing = trainer.weights + trainer.reference + server + 2 * CONTEXT
        a_token = shape.layers * 2 * ceil(shape.kv_heads / size) * shape.head_dim * number
        tokens = max(0, gpu - drawing) // a_token
        thinking = recipe.thinking_of(planned.stage)
        traces = tokens // longest_row(thinking, self._prompt(thinking))
        fits = learning <= gpu and traces > 0
        return fits, (
            f"stage {planned.stage.name}: {'colocated servers fit' if fits else 'wants servers apart'}; of "
            f"{gpu / GIB:.0f} GiB a GPU needs {learning / GIB:.0f} while the trainer learns, and "
            f"{drawing / GIB:.0f} while servers draw, beside their cache: room for {tokens:,} tokens, or "
            f"{traces:,} of the longest traces"
        )

    def _evaluation(self, thinking: Thinking) -> MemoryUse:
        """The stage's idle trainer remains in memory beside the engine of the evaluation."""
        evaluation = self.recipe.evaluation
        assert evaluation is not None  # a stage with `evaluate` has one
        slots = self._slots(
            evaluation.problems, evaluation.samples_per_problem, evaluation.max_concurrent_rollouts, thinking
        )
        idle = Workload(row=0, micro_batches=0, slots=slots)
        return replace(self._memory(self.parts[0], idle), activations=0, logits=0)

    def _prompt(self, thinking: Thinking) -> int:
        return max(1, min(self.longest.prompt, self.shape.max_positions - longest_response(thinking)))

    def _micro_batches(self, rows: int, longest: int) -> int:
        """Returns the micro-batches of one replica for `rows` of maximum length over all replicas."""
        in_one = max(1, self.recipe.max_tokens_per_micro_batch // longest)
        count = ceil(ceil(rows / self.data) / in_one)
        parallel = self.recipe.parallel
        return count + -count % (parallel.pipeline if parallel.virtual > 1 else 1)

    def _packed(self, longest: int) -> int:
        """Returns the most tokens of a packed row; one longer than `max_tokens_per_micro_batch` is alone."""
        most = max(self.recipe.max_tokens_per_micro_batch, longest)
        multiple = self.recipe.parallel.row_multiple * self.recipe.model.made_of.row_multiple
        return most + -most % multiple

    def _slots(self, prompts: int, samples: int, concurrent: int, thinking: Thinking) -> int | None:
        """Returns the most slots of a replica's cache: all its prompts, and the traces in progress."""
        if not self.in_process:
            return None
        traces, most = prompts * samples, 0
        prompt, trace = self._prompt(thinking), longest_row(thinking, 0)
        for rank in range(self.data):
            first, end = traces * rank // self.data, traces * (rank + 1) // self.data
            own = (end - 1) // samples - first // samples + 1 if end > first else 0
            most = max(most, own * prompt + min(concurrent, end - first) * trace)
        return most


def _rollout_rounds(stage: RlStage) -> tuple[int, int]:
    """Returns the most rounds of rollouts in a step, and the problems in each."""
    if stage.dynamic_sampling is None:
        return 1, stage.prompts_per_step
    return stage.dynamic_sampling.max_rounds, ceil(
        stage.dynamic_sampling.oversampling * stage.prompts_per_step
    )


def _bounded(longest: LengthLimits, recipe: Recipe) -> tuple[LengthLimits, list[str]]:
    """Returns the tighter of the bounds and the recipe's, and a note where the recipe allows more."""
    prompt, example = recipe.max_prompt_tokens, recipe.max_example_tokens
    kinds = {stage.kind for stage in recipe.trained_stages}
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


def _warnings(planned: StagePlan, recipe: Recipe, shape: ModelConfig, data: int, gpu: int) -> Iterator[str]:
    """Yields a warning for everything in a stage that does not fit."""
    stage, need = planned.stage, planned.memories[planned.fullest].total
    if need > gpu:
        lower = "max_tokens_per_micro_batch"
        if planned.slots is not None and isinstance(stage, RlStage):
            lower = f"its max_concurrent_rollouts ({stage.max_concurrent_rollouts}) or {lower}"
        yield (
            f"stage {stage.name}: about {need / GIB:.0f} GiB are needed, a GPU has {gpu / GIB:.0f}; "
            f"lower {lower}, recompute more, or split over more processes"
        )
    evaluation = recipe.evaluation
    if planned.evaluation and evaluation and (need := planned.evaluation.total) > gpu:
        yield (
            f"stage {stage.name}: its evaluation needs about {need / GIB:.0f} GiB, a GPU has "
            f"{gpu / GIB:.0f}; lower "
            f"evaluation.max_concurrent_rollouts ({evaluation.max_concurrent_rollouts})"
        )
    if planned.row > recipe.max_tokens_per_micro_batch:
        yield (
            f"stage {stage.name}: a row may have {planned.row:,} tokens; one longer than "
            f"max_tokens_per_micro_batch ({recipe.max_tokens_per_micro_batch:,}) is a micro-batch of "
            "its own, and memory is planned for it"
        )
    response = longest_response(recipe.thinking_of(stage))
    if response >= shape.max_positions:
        yield (
            f"stage {stage.name}: a response may have {response:,} tokens, the model supports "
            f"{shape.max_positions:,}"
        )
    together = planned.rows // (stage.mini_batches if isinstance(stage, RlStage) else 1)
    if together < data:
        yield f"stage {stage.name}: {together} rows an update leave some of {data} replicas idle"
