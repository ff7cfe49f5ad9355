"""A request's joined blocks: read from its sampling parameters, checked, and kept on the request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Req

from megatron_parallel_r1.rollout.joined import FIELD, decode
from megatron_parallel_r1.rollout.sglang_plugin.contexts import Context, read

ATTRIBUTE = "parallel_r1"


@dataclass(slots=True, eq=False)
class Join:
    """What the plugin keeps on a request.

    Attributes:
        context: behind its prompt.
        missing: contexts that it needs and the last match did not find whole, with how many tokens each
            lacks; of those that are not here yet only the ones whose own prerequisites are.
        writers: internal requests under way that write them.
        served: set on an internal request: whom it writes for.
    """

    context: Context
    missing: tuple[tuple[Context, int], ...] = ()
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
    """How far the request's positions lag behind its slots; the same for all that it computes."""
    join = of(req)
    return join.context.saved if join is not None else 0


def read_blocks(
    req: Req, scheduler: Any, recv_req: TokenizedGenerateReqInput, *args: Any, **named: Any
) -> None:
    """AFTER `Scheduler._create_generation_req`: reads the blocks; what it cannot read is answered with 400,
    for an exception here would end the scheduler."""
    params = recv_req.sampling_params.custom_params or {}
    if FIELD not in params:
        return
    try:
        blocks = decode(params[FIELD], len(req.origin_input_ids))
    except ValueError as error:
        req.set_finish_with_abort(str(error))
        return
    if blocks:
        context = read(req.origin_input_ids, blocks, req.extra_key)
        mark(req, Join(context))
        req.extra_key = context.namespace


def refuse_unsupported(scheduler: Any, req: Req, *args: Any, **named: Any) -> None:
    """BEFORE `Scheduler._add_request_to_queue`, where a request is settled: what a join cannot be."""
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
