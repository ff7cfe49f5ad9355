"""What a client learns from `GET /server_info`: that each scheduler has the plugin whole, and its counters.

SGLang only logs a plugin that fails to load, or a hook that finds no target; joins would then silently see
flat text. A client therefore takes joins to a server only if `joined.understood` says so.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_parallel_r1.rollout.joined import FIELD, PROTOCOL
from megatron_parallel_r1.rollout.sglang_plugin.admission import state_of
from megatron_parallel_r1.rollout.sglang_plugin.versions import TESTED


def tell(result: Any, scheduler: Any, *args: Any, **named: Any) -> None:
    """AFTER `Scheduler.get_internal_state`."""
    from megatron_parallel_r1.rollout.sglang_plugin.hooks import missing_hooks

    state = state_of(scheduler.tree_cache)
    result.internal_state[FIELD] = {
        "protocol": PROTOCOL,
        "tested": list(TESTED),
        "modes": ["isolated"],
        "nesting": True,
        "missing": missing_hooks() + (["state"] if state is None else []),
        "counters": asdict(state.counters) if state is not None else {},
    }
