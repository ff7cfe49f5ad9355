"""Admits a join to a batch once everything that it joins is in the cache.

Missing parts are written first, by internal requests (`requests.writer`) that are admitted in place of the
join. The ends of paths, not computed yet, take one extra pass of one or two tokens each. A path that the
cache lost is rebuilt whole, with a danger of live-lock: in a pool too small for all, rebuilding one trace
evicts another. Therefore

- one join at a time rebuilds, at the head of the queue until it is admitted;
- what it has so far is pinned against eviction;
- its pins are dropped when the running requests are short of memory (they end and free theirs), when it is
  aborted and when the cache is flushed.

A join is never longer than the pool, so the one at the head of the queue is always admitted, and each draws
tokens that count. While another prompt is being prefilled in chunks, nothing is pinned: it was admitted for
the memory of that time.
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

# The longest end of a path that the server has not seen: `</Parallel>` `<Summary>` `</Summary>` `</Path>`,
# all forced, after a block that left no room for a summary.
MAX_UNWRITTEN_END = 4
STATE = "parallel_r1"


@dataclass(slots=True)
class Counters:
    """Since the server started: requests with blocks; ends of paths written and their tokens; joins that
    lost some of their cache, the paths rebuilt for them and the tokens computed again; pins dropped for
    lack of memory."""

    joins: int = 0
    ends: int = 0
    end_tokens: int = 0
    rebuilds: int = 0
    rebuilt_paths: int = 0
    rebuilt_tokens: int = 0
    pins_dropped: int = 0


@dataclass(slots=True)
class PluginState:
    """The plugin's state in one scheduler; an attribute of its prefix cache.

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
        """Locks all cached parts of what `req` joins, then releases its previous locks."""
        whole, _ = find(self.cache, join.context, req.cache_salt)
        held = [self.cache.lock(node) for node in whole.values()]
        self.unpin()
        self.pins = held

    def forget(self, req: Req) -> None:
        """Forgets `req`, which is in a batch or gone."""
        if req in self.waiting:
            self.waiting.remove(req)
        if req is self.first:
            self.unpin()
            self.first = None


def state_of(cache: Any) -> PluginState:
    return getattr(cache, STATE)


def state_or_none(cache: Any) -> PluginState | None:
    """None: another cache of SGLang's, or before the plugin has started."""
    return getattr(cache, STATE, None)


def admit(
    original: Callable[..., AddReqResult],
    adder: PrefillAdder,
    req: Req,
    has_chunked_req: bool,
    truncation_align_size: int | None,
) -> AddReqResult:
    """AROUND `PrefillAdder.add_one_req`. Returning CONTINUE without `req` in the batch leaves it in the
    queue."""
    join, state = joined(req), state_of(adder.tree_cache)
    if join is None or is_writer(req):
        return original(adder, req, has_chunked_req, truncation_align_size)
    if not join.missing:
        result = original(adder, req, has_chunked_req, truncation_align_size)
        if req.lock is not None:
            state.forget(req)
            state.counters.joins += not req.retracted_stain
        return result
    if any(not internal.finished() for internal in join.writers) or not _may_write(state, req, join):
        return AddReqResult.CONTINUE
    if req is state.first:
        state.pin(req, join)
        if adder.budget_state() is AddReqResult.NO_TOKEN:
            state.unpin()
            return AddReqResult.NO_TOKEN
    return _write(original, adder, state, req, join, has_chunked_req, truncation_align_size)


def _may_write(state: PluginState, req: Req, join: Join) -> bool:
    """Whether `req` may write its missing parts now."""
    chunked = state.scheduler.chunked_req
    if chunked is not None and not is_writer(chunked):
        return False
    if req is state.first or all(count <= MAX_UNWRITTEN_END for _, count in join.missing):
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
    """Admits a writer for each context that `req` misses, as far as they fit.

    Of contexts that miss the same tokens (a lost trunk) one goes first, and the others then find them.
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
        internal = writer(req, context, f"writes-{len(context.before)}-{len(join.writers)}", state.scheduler)
        internal.init_next_round_input(adder.tree_cache)
        chunked = has_chunked_req or adder.new_chunked_req is not None
        result = original(adder, internal, chunked, truncation_align_size)
        if internal.lock is None:
            break
        join.writers.append(internal)
        _count(state, req, count)
        if result is not AddReqResult.CONTINUE:
            break
    if join.writers and req not in state.waiting:
        state.waiting.append(req)
    return result


def _has_row(adder: PrefillAdder, state: PluginState) -> bool:
    """Whether one more request fits in the batch, as the scheduler checks for each."""
    held = sum(other.kv.holds_kv for other in adder.can_run_list)
    rows = state.scheduler.get_num_allocatable_reqs(
        len(adder.running_batch.reqs), running_batch=adder.running_batch, num_held_rows=held
    )
    return len(adder.can_run_list) < rows


def _count(state: PluginState, req: Req, tokens: int) -> None:
    counters = state.counters
    if tokens <= MAX_UNWRITTEN_END:
        counters.ends += 1
        counters.end_tokens += tokens
        return
    counters.rebuilt_paths += 1
    counters.rebuilt_tokens += tokens
    logger.warning("parallel_r1: computes %d lost tokens of %s again", tokens, req.rid)


def keep_pinned(result: None, cache: Any, req: Req, **named: Any) -> None:
    """AFTER `UnifiedRadixCache.checkpoint_into_tree`: pins what was written for the first join."""
    join, state = of(req), state_or_none(cache)
    if state is None or join is None or join.served is None:
        return
    if join.served is state.first and req.finished():
        state.pins.append(cache.lock(req.last_node))


def forget_ended(scheduler: Any, *args: Any, **named: Any) -> None:
    """BEFORE `Scheduler.get_new_batch_prefill`: forgets joins that left the queue and writers that
    ended."""
    state = state_of(scheduler.tree_cache)
    if state.first is None and not state.waiting:
        return
    queued = set(scheduler.waiting_queue)
    alive = queued | scheduler.collect_inflight_reqs() | {scheduler.chunked_req}
    for req in {state.first, *state.waiting} - queued - {None}:
        state.forget(req)
    for req in state.waiting:
        join = of(req)
        assert join is not None  # Only joins wait.
        join.writers = [internal for internal in join.writers if internal in alive]


def head_queue(result: None, policy: Any, waiting_queue: list[Req], *args: Any, **named: Any) -> None:
    """AFTER `SchedulePolicy.calc_priority`: after another request that waits for memory, the first join would
    wait forever, and that request for its pins."""
    state = state_or_none(policy.tree_cache)
    if state is not None and state.first in waiting_queue:
        waiting_queue.remove(state.first)
        waiting_queue.insert(0, state.first)


def drop_pins(batch: ScheduleBatch, *args: Any, **named: Any) -> None:
    """BEFORE `ScheduleBatch.retract_decode`: SGLang retracts when memory runs out, and aborts the last
    request; it does not know of memory held without a running request."""
    state = state_of(batch.tree_cache)
    if state.pins and not batch.check_decode_mem():
        state.counters.pins_dropped += len(state.pins)
        state.unpin()


def forget_pins(cache: Any, *args: Any, **named: Any) -> None:
    """BEFORE `UnifiedRadixCache.reset`: the nodes are gone with their locks."""
    state = state_or_none(cache)
    if state is not None:
        state.pins = []
