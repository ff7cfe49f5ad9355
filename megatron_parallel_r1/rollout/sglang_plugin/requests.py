"""Reads a request's joined blocks from its sampling parameters, checks them, and keeps them on the
request."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Req

from megatron_parallel_r1.rollout.joined_blocks import FIELD, decode_blocks
from megatron_parallel_r1.rollout.sglang_plugin.contexts import CacheContext, context_of

ATTRIBUTE = "parallel_r1"


@dataclass(slots=True, eq=False)
class Join:
    """The plugin's data on a request.

    Attributes:
        context: after its prompt.
        missing: contexts that it needs and the last match did not find whole, with the number of missing
            tokens; only those whose own prerequisites are cached.
        writers: internal requests under way that write them.
        served: set on an internal request: the request that it writes for.
    """

    context: CacheContext
    missing: tuple[tuple[CacheContext, int], ...] = ()
    writers: list[Req] = field(default_factory=list)
    served: Req | None = None


def mark(req: Req, join: Join) -> None:
    setattr(req, ATTRIBUTE, join)


def of(req: Req) -> Join | None:
    """None: an ordinary request."""
    return getattr(req, ATTRIBUTE, None)


def joined(req: Req) -> Join | None:
    """As `of`, but None too for an internal request whose context has no block."""
    join = of(req)
    return join if join is not None and join.context.pieces else None


def saved(req: Req) -> int:
    """The request's slots minus positions; the same for all tokens that it computes."""
    join = of(req)
    return join.context.saved if join is not None else 0


def read_blocks(
    req: Req, scheduler: Any, recv_req: TokenizedGenerateReqInput, *args: Any, **named: Any
) -> None:
    """AFTER `Scheduler._create_generation_req`: reads the blocks; answers 400 if they are invalid, for an
    exception here would end the scheduler."""
    params = recv_req.sampling_params.custom_params or {}
    if FIELD not in params:
        return
    try:
        blocks = decode_blocks(params[FIELD], len(req.origin_input_ids))
    except ValueError as error:
        req.set_finish_with_abort(str(error))
        return
    if blocks:
        context = context_of(req.origin_input_ids, blocks, req.extra_key)
        mark(req, Join(context))
        req.extra_key = context.namespace


def refuse_unsupported(scheduler: Any, req: Req, *args: Any, **named: Any) -> None:
    """BEFORE `Scheduler._add_request_to_queue`, where a request is final: refuses what a join cannot be."""
    join = joined(req)
    if join is None or join.served is not None or req.to_finish is not None:
        return
    start = len(join.context.before)
    broken = {
        "its prompt was cut": len(req.origin_input_ids) != join.context.length,
        f"logprob_start_len lies below {start}, where its last block ends": (
            req.return_logprob and 0 <= req.logprob_start_len < start
        ),
        "it is a beam search": req.beam_group is not None,
        "it belongs to a session": req.session is not None or req.session_id is not None,
        "it has multimodal or embedded inputs": (
            req.multimodal_inputs is not None
            or req.input_embeds is not None
            or req.positional_embed_overrides is not None
        ),
    }
    reasons = [reason for reason, holds in broken.items() if holds]
    if reasons:
        setattr(req, ATTRIBUTE, None)
        req.set_finish_with_abort(f"{FIELD}: a request with blocks is refused: {'; '.join(reasons)}")


def writer(req: Req, context: CacheContext, name: str, scheduler: Any) -> Req:
    """An internal request that writes `context` to the cache as `req` would.

    Its rid begins with that of `req`, so aborting one aborts both.
    """
    params = copy(req.sampling_params)
    params.max_new_tokens, params.min_new_tokens = 1, 0
    internal = Req(
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
    internal.tokenizer = req.tokenizer
    internal.extra_key = context.namespace
    internal.logprob_start_len = -1
    internal.time_stats.set_wait_queue_entry_time()
    mark(internal, Join(context, served=req))
    return internal


def is_writer(req: Req) -> bool:
    join = of(req)
    return join is not None and join.served is not None


def hide_output(
    streamer: Any, reqs: list[Req], *args: Any, **named: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """BEFORE `SchedulerOutputStreamer.stream_output`: drops the output of writers."""
    return (streamer, [req for req in reqs if not is_writer(req)], *args), named


def hide_abort(original: Callable[..., None], scheduler: Any, abort_req: Any, req: Req) -> None:
    """AROUND `Scheduler.send_abort_output`."""
    if not is_writer(req):
        original(scheduler, abort_req, req)
