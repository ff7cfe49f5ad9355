"""What can be known of all stages of a run before the first step of the first one."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import fields
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
from megatron_parallel_r1.config.data import DistilledTraces, data_sets
from megatron_parallel_r1.config.recipe import TRACES
from megatron_parallel_r1.config.rollout import Rollout
from megatron_parallel_r1.config.stages import AnyStage, DistillStage, RlStage, SftStage, TrainingStage
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import template_columns
from megatron_parallel_r1.distributed.collectives import run_on_rank_zero
from megatron_parallel_r1.errors import ServersLost, UserError
from megatron_parallel_r1.rollout.launcher.run import check_launch
from megatron_parallel_r1.rollout.servers.client import STOCK_MODES, ServerInfo, Timeouts
from megatron_parallel_r1.rollout.servers.engine import connect_pool
from megatron_parallel_r1.rollout.servers.pool import PoolSettings
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.run.datasets import problem_stream
from megatron_parallel_r1.run.own_servers import launch_settings
from megatron_parallel_r1.run.sources import evaluation_problems, stage_items
from megatron_parallel_r1.run.transport import usable_sync
from megatron_parallel_r1.sft.loop import example_stream
from megatron_parallel_r1.sync.settings import Sync
from megatron_parallel_r1.sync.sglang import check_transport
from megatron_parallel_r1.utils.rank import local_world_size
from megatron_parallel_r1.utils.settings import Settings

# How long the start of a run waits for servers that no step needs yet.
PATIENCE_S = 10.0
# Items of embedded data whose lengths are looked at; they are all much alike.
EMBEDDED_ITEMS = 64
# Most tokens of a prompt for each character of its problem, and beside the problem. Longer ones are counted.
TOKENS_PER_CHARACTER, TEMPLATE_TOKENS = 4, 4096


def check_stage_data(run: RunContext, names: Collection[str]) -> None:
    """Reads the data of the stages in `names` that are not finished, as the stages themselves will.

    Raises:
        UserError: an example is malformed, all are too long for their limit, or one needs more positions than
            the model has.
    """
    recipe = run.recipe
    for stage in _unfinished(run, names):
        counts: list[tuple[Settings, int]] = [
            (data, sum(1 for _ in stage_items(recipe, stage, data).in_order()))
            for data in data_sets(stage.data)
        ]
        if isinstance(stage.data, DistilledTraces):  # as long as an earlier stage may sample them
            counts = []
        elif not counts:
            counts = [(stage.data, EMBEDDED_ITEMS)]
        # Each set of a mixture by itself: all of it is seen, whatever its weight.
        for data, count in counts:
            with redirect_stderr(StringIO()):  # the stage itself says what it leaves out
                _check_items(run, stage.model_copy(update={"data": data}), count)
        fields = template_columns(recipe.prompt_template)
        if isinstance(stage, TrainingStage) and stage.evaluate and recipe.evaluation is not None:
            held_out = evaluation_problems(recipe.evaluation.data, recipe.evaluation.problems, fields)
            _check_prompts(run, stage, held_out)
        for settings in stage.evaluation_sets.values():
            held_out = evaluation_problems(settings.data, settings.problems, fields)
            _check_prompts(run, stage, held_out, settings.thinking)


def _check_items(run: RunContext, stage: AnyStage, count: int) -> None:
    """Draws `count` items of a stage and checks their lengths."""
    if not isinstance(stage, SftStage):
        stream = problem_stream(run.recipe, stage, 0, run.prompt_tokens)
        problems = [stream.next_batch(1)[0] for _ in range(count)]
        _check_prompts(run, stage, problems)
        if isinstance(stage, DistillStage) and any(problem.context for problem in problems):
            raise UserError(
                f"stage {stage.name}: its problems have messages before the question, which {TRACES} cannot "
                "hold; leave them out, or name the question alone, such as columns.prompt: messages.user"
            )
        return
    rows = example_stream(run, stage)
    longest = max(int(rows.next_batch(1)[0].positions_L.max()) + 1 for _ in range(count))
    if longest > run.shape.max_positions:
        raise UserError(
            f"stage {stage.name}: its longest example has {longest:,} positions, the model has "
            f"{run.shape.max_positions:,} (max_positions); set max_example_tokens"
        )


def check_engine(run: RunContext, names: Collection[str]) -> None:
    """Checks that the recipe's servers, or those that it will start, can serve the stages in `names`.

    Servers that do not answer yet are no error: a stage waits for them when it needs them. A collective over
    all ranks.

    Raises:
        UserError: they cannot; on every rank.
    """
    if run.recipe.rollout.engine == "native":
        return
    stages = [stage for stage in _unfinished(run, names) if stage.samples_traces]
    if stages:
        run_on_rank_zero(lambda: _check_servers(run, stages))


def _unfinished(run: RunContext, names: Collection[str]) -> list[AnyStage]:
    return [s for s in run.recipe.stages if s.name in names and not run.was_finished(s.name)]


def _check_prompts(
    run: RunContext,
    stage: AnyStage,
    problems: Iterable[Problem],
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Checks that a response to the longest prompt needs no more positions than the model has.

    Args:
        changes: to the stage's `thinking`.
    """
    thinking = run.recipe.thinking_of(stage).replace(**changes)
    response = thinking.max_response_tokens
    if thinking.mode == "isolated":  # in which the paths of a block share positions
        response = min(response, thinking.max_critical_tokens or response)
    most = run.shape.max_positions - response
    characters = (most - TEMPLATE_TOKENS) // TOKENS_PER_CHARACTER - len(run.recipe.prompt_template)
    if template_columns(run.recipe.prompt_template):  # of any length
        characters = 0
    long = (p for p in problems if len(p.prompt) + sum(len(text) for _, text in p.context) > characters)
    longest = max(map(run.prompt_tokens, long), default=0)
    if longest > most:
        raise UserError(
            f"stage {stage.name}: a prompt of {longest:,} tokens and a response of {response:,} need more "
            f"positions than the model has ({run.shape.max_positions:,}, max_positions); lower "
            "thinking.max_response_tokens, or set max_prompt_tokens"
        )


def _check_servers(run: RunContext, stages: Sequence[AnyStage]) -> None:
    rollout = run.recipe.rollout
    if rollout.servers:
        modes = STOCK_MODES | ({"isolated"} if rollout.engine == "sglang" else set())
        _check_modes(run, stages, f"{rollout.engine} servers", modes)
        _check_experts(run, stages, f"{rollout.engine} servers", rollout.engine == "sglang")
        isolated = any(run.recipe.thinking_of(stage).mode == "isolated" for stage in stages)
        check_launch(launch_settings(rollout, run.folder, isolated, run.folder, local_world_size()))
        _check_transport(rollout, {})
        return
    settings = PoolSettings(patience_s=min(PATIENCE_S, rollout.patience_s))
    try:
        key, file = rollout.api_key, rollout.urls_file
        pool = connect_pool(
            rollout.engine, rollout.urls, Timeouts(), settings, file, key=key, router=rollout.router
        )
    except ServersLost as error:
        reason = str(error).partition("; restart")[0]
        print(f"warning: {reason}; stage {stages[0].name} will need one", file=sys.stderr)
        return
    _check_modes(run, stages, f"the servers ({', '.join(pool.infos)})", pool.modes)
    sync = _check_transport(rollout, pool.infos)
    for url, info in pool.infos.items():
        check_transport(url, info.copies, info.nodes, sync.transport)
        _check_model(run, url, info)
        _check_experts(run, stages, url, info.experts)
        for stage in stages:
            response = run.recipe.thinking_of(stage).max_response_tokens
            if response >= info.max_tokens:
                raise UserError(
                    f"stage {stage.name}: {url} takes {info.max_tokens:,} tokens, prompt and response "
                    f"together, and a response may have {response:,}; start it with a longer context, or "
                    "lower thinking.max_response_tokens"
                )


def _check_transport(rollout: Rollout, infos: Mapping[str, ServerInfo]) -> Sync:
    """How the weights will travel, with a warning if the recipe says otherwise."""
    sync, warning = usable_sync(rollout, infos)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    return sync


def _check_modes(run: RunContext, stages: Sequence[AnyStage], servers: str, modes: Collection[str]) -> None:
    for stage in stages:
        mode = run.recipe.thinking_of(stage).mode
        if mode not in modes:
            raise UserError(
                f"stage {stage.name}: thinking.mode {mode}: {servers} are exact in "
                f"{', '.join(sorted(modes))}; start SGLang by serve-rollout --isolated, or set mode replay"
            )


def _check_experts(run: RunContext, stages: Sequence[AnyStage], servers: str, returned: bool) -> None:
    """Checks that the experts of a mixture, which a stage replays, are returned."""
    if returned or run.shape.experts is None:
        return
    for stage in stages:
        if isinstance(stage, RlStage) and stage.objective.replay_experts:
            raise UserError(
                f"stage {stage.name}: objective.replay_experts: {servers} return no experts; start SGLang "
                "with --enable-return-routed-experts, which serve-rollout adds for a mixture of experts, or "
                "set it to false"
            )


def _check_model(run: RunContext, url: str, info: ServerInfo) -> None:
    """Checks the architecture that a server was started with, where its folder can be read from here."""
    folder = Path(info.model)
    if not (folder / "config.json").is_file():
        return
    served, _ = load_hf_folder(folder)
    for name in (field.name for field in fields(served) if field.name != "max_positions"):
        here, there = getattr(run.shape, name), getattr(served, name)
        if here != there:
            raise UserError(
                f"{url} serves {folder}, whose {name} is {there}, and the run's model has {here}: start it "
                "with the model that the run trains"
            )
