"""Internal requests: what a join needs and the cache lacks is written by an ordinary request of the
scheduler's own, for the context that it is missing from, whose one drawn token nobody sees.

A path's last tokens are always missing: the server never computed the last one that it drew, and a
`</Path>` that the client forced was never sent. A path is missing (whole or its end) where its cache was
evicted or flushed.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

from sglang.srt.managers.schedule_batch import Req

from megatron_parallel_r1.rollout.sglang_plugin.contexts import Context
from megatron_parallel_r1.rollout.sglang_plugin.request import Join, mark, of


def writer(req: Req, context: Context, name: str, scheduler: Any) -> Req:
    """A request that has `context` in the cache once it is done, as `req` would have written it.

    Its rid begins with that of `req`, so that aborting one aborts both.
    """
    params = copy(req.sampling_params)
    params.max_new_tokens, params.min_new_tokens = 1, 0
    made = Req(
        rid=f"{req.rid}-{name}",
        origin_input_text="",
        origin_input_ids=context.tokens,
        sampling_params=params,
        lora_id=req.lora_id,
        eos_token_ids=req.eos_token_ids,
        vocab_size=req.vocab_size,
        priority=req.priority,
        cache_salt=req.cache_salt,
        disagg_mode=scheduler.disaggregation_mode,
        http_worker_ipc=req.http_worker_ipc,
    )
    made.tokenizer = req.tokenizer
    made.extra_key = context.namespace
    made.logprob_start_len = -1
    made.time_stats.set_wait_queue_entry_time()
    mark(made, Join(context, served=req))
    return made


def is_writer(req: Req) -> bool:
    join = of(req)
    return join is not None and join.served is not None


def hide_output(
    streamer: Any, reqs: list[Req], *args: Any, **named: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """BEFORE `SchedulerOutputStreamer.stream_output`: nobody asked for what a writer draws."""
    return (streamer, [req for req in reqs if not is_writer(req)], *args), named


def hide_abort(original: Callable[..., None], scheduler: Any, abort_req: Any, req: Req) -> None:
    """AROUND `Scheduler.send_abort_output`."""
    if not is_writer(req):
        original(scheduler, abort_req, req)
