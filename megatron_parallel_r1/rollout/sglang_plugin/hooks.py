"""All hooks of the plugin into SGLang, and its report in the server information."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from megatron_parallel_r1.rollout.joined_blocks import FIELD, PROTOCOL
from megatron_parallel_r1.rollout.sglang_plugin import (
    TESTED,
    admission,
    cache,
    compatibility,
    positions,
    requests,
)
from megatron_parallel_r1.rollout.sglang_plugin.admission import state_or_none

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
        "missing": missing_hooks() + (["state"] if state is None else []),
        "counters": asdict(state.counters) if state is not None else {},
    }


HOOKS = (
    Hook(SCHEDULER + "__init__", compatibility.start, HookType.AFTER),
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
