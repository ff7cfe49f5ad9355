"""Settings refused at start, all hooks into SGLang, and the report in the server information."""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_parallel

from megatron_parallel_r1.rollout.joined_blocks import FIELD, PROTOCOL
from megatron_parallel_r1.rollout.sglang_plugin import TESTED, admission, cache, positions, requests
from megatron_parallel_r1.rollout.sglang_plugin.admission import STATE, PluginState, state_or_none
from megatron_parallel_r1.rollout.sglang_plugin.positions import make_table

logger = logging.getLogger(__name__)

SRT = "sglang.srt."
SCHEDULER = SRT + "managers.scheduler.Scheduler."
BATCH = SRT + "managers.schedule_batch.ScheduleBatch."
CACHE = SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache."


@dataclass(frozen=True, slots=True)
class Hook:
    target: str
    function: Callable[..., Any]
    kind: HookType


def report_state(result: Any, scheduler: Any, *args: Any, **named: Any) -> None:
    """AFTER `Scheduler.get_internal_state`."""
    state = state_or_none(scheduler.tree_cache)
    result.internal_state[FIELD] = {
        "protocol": PROTOCOL,
        "tested": list(TESTED),
        "modes": ["isolated"],
        "nesting": True,
        "nccl": list(torch.cuda.nccl.version()[:3]) if torch.version.cuda else [],
        "missing": missing_hooks() + (["state"] if state is None else []),
        "counters": asdict(state.counters) if state is not None else {},
    }


def refused(scheduler: Any) -> list[str]:
    """The settings of this scheduler that the plugin cannot serve, each as what to do instead."""
    tree, parallel = scheduler.tree_cache, get_parallel()
    runner = scheduler.tp_worker.model_runner
    unified = isinstance(tree, UnifiedRadixCache) and not tree.disable
    wrong = {
        # Without a named backend, deterministic inference takes FlashInfer on Blackwell.
        "leave the radix cache on, of the default kind (deterministic inference turns it off under "
        "FlashInfer: set --attention-backend triton)": not unified,
        "set --page-size 1": scheduler.page_size != 1,
        "leave out models with windows, chunked attention or Mamba layers": (
            bool(runner.sliding_window_size or runner.attention_chunk_size)
            or (unified and tuple(tree.tree_components) != (ComponentType.FULL,))
        ),
        "leave the host cache tiers off": unified
        and (tree.cache_controller is not None or tree.linker is not None),
        "leave speculative decoding off": not scheduler.spec_algorithm.is_none(),
        "leave disaggregated prefill off": scheduler.disaggregation_mode != DisaggregationMode.NULL,
        "set --pp-size 1": parallel.pp_size != 1,
        "set --dp-size 1: start one server a replica": parallel.dp_size != 1,
        "leave multimodal rotary positions out": runner.model_config.model_is_mrope,
    }
    return [what for what, holds in wrong.items() if holds]


def start(result: None, scheduler: Any, *args: Any, **named: Any) -> None:
    """AFTER `Scheduler.__init__`: creates the plugin's state.

    Raises:
        SystemExit: the settings are refused; SGLang's parent process then ends too.
    """
    wrong = refused(scheduler)
    if wrong:
        line = f"parallel_r1: this server cannot serve isolated paths exactly: {'; '.join(wrong)}"
        logger.error(line)
        raise SystemExit(line)
    setattr(scheduler.tree_cache, STATE, PluginState(scheduler))
    make_table(scheduler.req_to_token_pool)


HOOKS = (
    Hook(SCHEDULER + "__init__", start, HookType.AFTER),
    Hook(SCHEDULER + "_create_generation_req", requests.read_blocks, HookType.AFTER),
    Hook(SCHEDULER + "_add_request_to_queue", requests.refuse_unsupported, HookType.BEFORE),
    Hook(SCHEDULER + "get_new_batch_prefill", admission.forget_ended, HookType.BEFORE),
    Hook(SCHEDULER + "send_abort_output", requests.hide_abort, HookType.AROUND),
    Hook(SCHEDULER + "get_internal_state", report_state, HookType.AFTER),
    Hook(
        SRT + "managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output",
        requests.hide_output,
        HookType.BEFORE,
    ),
    Hook(SRT + "managers.schedule_policy.SchedulePolicy.calc_priority", admission.head_queue, HookType.AFTER),
    Hook(SRT + "managers.schedule_policy.PrefillAdder.add_one_req", admission.admit, HookType.AROUND),
    Hook(BATCH + "prepare_for_extend", positions.note_saved, HookType.AFTER),
    Hook(BATCH + "retract_decode", admission.drop_pins, HookType.BEFORE),
    Hook(SRT + "mem_cache.common.match_kv_cache", cache.match, HookType.AROUND),
    Hook(CACHE + "lock", cache.lock, HookType.AROUND),
    Hook(CACHE + "unlock", cache.unlock, HookType.AROUND),
    Hook(CACHE + "prefix_device_indices", cache.slots, HookType.AROUND),
    Hook(CACHE + "checkpoint_into_tree", cache.keep, HookType.AROUND),
    Hook(CACHE + "checkpoint_into_tree", admission.keep_pinned, HookType.AFTER),
    Hook(CACHE + "reset", admission.forget_pins, HookType.BEFORE),
    Hook(SRT + "model_executor.forward_batch_info.ForwardBatch.init_new", positions.shift, HookType.AFTER),
    Hook(SRT + "model_executor.model_runner.ModelRunner.sample", positions.sample, HookType.AROUND),
)


def register_hooks() -> None:
    """Registers all; SGLang applies them once every plugin is loaded."""
    for hook in HOOKS:
        HookRegistry.register(hook.target, hook.function, hook.kind)


def missing_hooks() -> list[str]:
    """Targets that SGLang has not wrapped (it only logs why), including those that a release lacks."""
    targets = dict.fromkeys(hook.target for hook in HOOKS)
    return [target for target in targets if not _is_wrapped(target)]


def _is_wrapped(target: str) -> bool:
    try:
        return hasattr(pkgutil.resolve_name(target), "__wrapped__")
    except (ImportError, AttributeError):
        return False
