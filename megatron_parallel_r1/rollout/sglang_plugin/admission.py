"""How a join gets into a batch: once all that it joins is in the cache.

What is missing is written first, by internal requests (writers.py) that are let in in the join's stead. The
ends of paths, which nobody computed yet, take one extra pass of a token or two each. A path that the cache
lost is rebuilt whole, and there the danger is live-lock: in a pool too small for all, one trace's
rebuilding evicts another's. So

- one join at a time rebuilds, and it heads the queue until it is let in;
- what it has so far is pinned: no eviction takes it;
- its pins go when the running requests are short of memory (they end and free theirs), when it is aborted
  and when the cache is flushed.

A join is never longer than the pool, so the one that heads the queue always gets in, and each draws tokens
that count. While some other prompt is being written chunk by chunk nobody is pinned: it was let in for the
memory as it was then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.mem_cache.base_prefix_cache import TreeLock

from megatron_parallel_r1.rollout.sglang_plugin.cache import find
from megatron_parallel_r1.rollout.sglang_plugin.requests import Join, is_writer, joined, of, writer

logger = logging.getLogger(__name__)

# The most that a path can end with unseen by the server: `</Parallel>` `<Summary>` `</Summary>` `</Path>`,
# all forced, behind a block that left no room for a summary.
NEVER_WRITTEN = 4
STATE = "parallel_r1"


@dataclass(slots=True)
class Counters:
    """Since the server started: requests with blocks; ends of paths written and their tokens; joins that
    lost some of their cache, the paths rebuilt for them and the tokens computed again; pins given up for
    want of memory."""

    joins: int = 0
    ends: int = 0
    end_tokens: int = 0
    rebuilds: int = 0
    rebuilt_paths: int = 0
    rebuilt_tokens: int = 0
    pins_dropped: int = 0


@dataclass(slots=True)
class PluginState:
    """What the plugin knows in one scheduler; an attribute of its prefix cache.

    Attributes:
        first: the join that rebuilds.
        pins: locks on what it has so far.
        waiting: joins with writers under way.
    """

    scheduler: Any
    counters: Counters = field(default_factory=Counters)
    first: Req | None = None
    pins: list[TreeLock] = field(default_factory=list)
    waiting: list[Req] = field(default_factory=list)

    @property
    def cache(self) -> Any:
        return self.scheduler.tree_cache

    def unpin(self) -> None:
        for pin in self.pins:
            self.cache.unlock(pin)
        self.pins = []

    def pin(self, req: Req, join: Join) -> None:
        """Locks all that is here of what `req` joins, and lets go of what it had locked before."""
        whole, _ = find(self.cache, join.context, req.cache_salt)
        held = [self.cache.lock(node) for node in whole.values()]
        self.unpin()
        self.pins = held

    def leave(self, req: Req) -> None:
        """`req` is in a batch, or gone."""
        if req in self.waiting:
            self.waiting.remove(req)
        if req is self.first:
            self.unpin()
            self.first = None


def state_of(cache: Any) -> PluginState | None:
    return getattr(cache, STATE, None)


def admit(
    original: Callable[..., AddReqResult],
    adder: PrefillAdder,
    req: Req,
    has_chunked_req: bool,
    truncation_align_size: int | None,
) -> AddReqResult:
    """AROUND `PrefillAdder.add_one_req`. CONTINUE without `req` in the batch: it stays in the queue."""
    join, state = joined(req), state_of(adder.tree_cache)
    if join is None or is_writer(req):
        return original(adder, req, has_chunked_req, truncation_align_size)
    if not join.missing:
        result = original(adder, req, has_chunked_req, truncation_align_size)
        if req.lock is not None:
            state.leave(req)
            state.counters.joins += not req.retracted_stain
        return result
    if any(not made.finished() for made in join.writers) or not _turn(state, req, join):
        return AddReqResult.CONTINUE
    if req is state.first:
        state.pin(req, join)
        if adder.budget_state() is AddReqResult.NO_TOKEN:
            state.unpin()
            return AddReqResult.NO_TOKEN
    return _write(original, adder, state, req, join, has_chunked_req, truncation_align_size)


def _turn(state: PluginState, req: Req, join: Join) -> bool:
    """Whether `req` may write what it misses now."""
    chunked = state.scheduler.chunked_req
    if chunked is not None and not is_writer(chunked):
        return False
    if req is state.first or all(count <= NEVER_WRITTEN for _, count in join.missing):
        return True
    if state.first is not None:
        return False
    state.first = req
    state.counters.rebuilds += 1
    logger.warning("parallel_r1: %s lost paths from the cache; they are rebuilt", req.rid)
    return True


def _write(
    original: Callable[..., AddReqResult],
    adder: PrefillAdder,
    state: PluginState,
    req: Req,
    join: Join,
    has_chunked_req: bool,
    truncation_align_size: int | None,
) -> AddReqResult:
    """Lets in a writer for each context that `req` misses, as far as they fit.

    Of contexts that miss the same tokens (a trunk that was lost) one goes first, and the others find them.
    """
    join.writers = []
    result = AddReqResult.CONTINUE
    begun: set[tuple[str | None, bytes]] = set()
    for context, count in join.missing:
        lacks = context.namespace, context.tail[: len(context.tail) - count + 1].tobytes()
        if lacks in begun:
            continue
        if not _has_row(adder, state):
            break
        begun.add(lacks)
        made = writer(req, context, f"writes-{len(context.before)}-{len(join.writers)}", state.scheduler)
        made.init_next_round_input(adder.tree_cache)
        chunked = has_chunked_req or adder.new_chunked_req is not None
        result = original(adder, made, chunked, truncation_align_size)
        if made.lock is None:
            break
        join.writers.append(made)
        _count(state, req, count)
        if result is not AddReqResult.CONTINUE:
            break
    if join.writers and req not in state.waiting:
        state.waiting.append(req)
    return result


def _has_row(adder: PrefillAdder, state: PluginState) -> bool:
    """Whether one more request of the batch would have a row, as the scheduler itself asks for each."""
    held = sum(other.kv.holds_kv for other in adder.can_run_list)
    rows = state.scheduler.get_num_allocatable_reqs(
        len(adder.running_batch.reqs), running_batch=adder.running_batch, num_held_rows=held
    )
    return len(adder.can_run_list) < rows


def _count(state: PluginState, req: Req, tokens: int) -> None:
    counters = state.counters
    if tokens <= NEVER_WRITTEN:
        counters.ends += 1
        counters.end_tokens += tokens
        return
    counters.rebuilt_paths += 1
    counters.rebuilt_tokens += tokens
    logger.warning("parallel_r1: computes %d lost tokens of %s again", tokens, req.rid)


def keep_pinned(result: None, cache: Any, req: Req, **named: Any) -> None:
    """AFTER `UnifiedRadixCache.checkpoint_into_tree`: what was written for the first join stays."""
    join, state = of(req), state_of(cache)
    if join is not None and join.served is not None and join.served is state.first and req.finished():
        state.pins.append(cache.lock(req.last_node))


def look_after(scheduler: Any, *args: Any, **named: Any) -> None:
    """BEFORE `Scheduler.get_new_batch_prefill`: forgets joins that left the queue and writers that are
    gone."""
    state = state_of(scheduler.tree_cache)
    if state.first is None and not state.waiting:
        return
    queued = set(scheduler.waiting_queue)
    alive = queued | scheduler.collect_inflight_reqs() | {scheduler.chunked_req}
    for req in {state.first, *state.waiting} - queued - {None}:
        state.leave(req)
    for req in state.waiting:
        join = of(req)
        join.writers = [made for made in join.writers if made in alive]


def head_queue(result: None, policy: Any, waiting_queue: list[Req], *args: Any, **named: Any) -> None:
    """AFTER `SchedulePolicy.calc_priority`: behind another that waits for memory, the first join would wait
    for ever, and that one for its pins."""
    state = state_of(policy.tree_cache)
    if state is not None and state.first in waiting_queue:
        waiting_queue.remove(state.first)
        waiting_queue.insert(0, state.first)


def drop_pins(batch: ScheduleBatch, *args: Any, **named: Any) -> None:
    """BEFORE `ScheduleBatch.retract_decode`: SGLang retracts for want of memory, and aborts the last
    request that is left; it does not know of memory that nobody runs on."""
    state = state_of(batch.tree_cache)
    if state.pins and not batch.check_decode_mem():
        state.counters.pins_dropped += len(state.pins)
        state.unpin()


def forget_pins(cache: Any, *args: Any, **named: Any) -> None:
    """BEFORE `UnifiedRadixCache.reset`: the nodes are gone with their locks."""
    state = state_of(cache)
    if state is not None:
        state.pins = []
