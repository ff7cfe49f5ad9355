"""Refuses, at start, settings under which a join would not be exact or was never tested."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_parallel

from megatron_parallel_r1.rollout.sglang_plugin.admission import STATE, PluginState
from megatron_parallel_r1.rollout.sglang_plugin.positions import make_table

logger = logging.getLogger(__name__)


def refused(scheduler: Any) -> list[str]:
    """The settings of this scheduler that the plugin cannot serve, each as what to do instead."""
    cache, parallel = scheduler.tree_cache, get_parallel()
    runner = scheduler.tp_worker.model_runner
    unified = isinstance(cache, UnifiedRadixCache) and not cache.disable
    wrong = {
        # Without a named backend, deterministic inference takes FlashInfer on Blackwell.
        "leave the radix cache on, of the default kind (deterministic inference turns it off under "
        "FlashInfer: set --attention-backend triton)": not unified,
        "set --page-size 1": scheduler.page_size != 1,
        "leave out models with windows, chunked attention or Mamba layers": (
            bool(runner.sliding_window_size or runner.attention_chunk_size)
            or (unified and tuple(cache.tree_components) != (ComponentType.FULL,))
        ),
        "leave the host cache tiers off": unified
        and (cache.cache_controller is not None or cache.linker is not None),
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
