"""The prefix cache of a joined context: matches, locks, reads and stores it.

A joined request's `last_node` is a `Joint`: the node of its own chain, as SGLang expects, which carries the
nodes of all other chains. A split node keeps its id with its lower part, so ids stay valid while locked.
SGLang's bookkeeping is unchanged: the tree owns a request's row up to `cache_protected_len`, here including
everything joined, and the request owns the rest.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams, MatchResult, TreeLock
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from megatron_parallel_r1.rollout.sglang_plugin.contexts import CacheContext
from megatron_parallel_r1.rollout.sglang_plugin.requests import joined

Slots = tuple[int, int, int]  # slots [lo, hi) of the path from the root to a node


class Joint(int):
    """A node id with the slots before its chain."""

    before: tuple[Slots, ...]

    def __new__(cls, node: int, before: tuple[Slots, ...]) -> Joint:
        self = super().__new__(cls, node)
        self.before = before
        return self


def find(
    cache: UnifiedRadixCache, context: CacheContext, salt: str | None
) -> tuple[dict[CacheContext, int], tuple[tuple[CacheContext, int], ...]]:
    """Looks up the contexts that `context` joins.

    Returns:
        The node of each whole context; and the others that could be written now, with their number of missing
        tokens.
    """
    whole: dict[CacheContext, int] = {}
    missing: list[tuple[CacheContext, int]] = []
    for piece in context.pieces:
        source = piece.context
        if any(other.context not in whole for other in source.pieces):
            continue
        key = RadixKey(source.tail, source.namespace, cache_salt=salt)
        match = cache.match_prefix(MatchPrefixParams(key=key))
        if match.device_prefix_len == len(source.tail):
            whole[source] = match.last_device_node
        else:
            missing.append((source, len(source.tail) - match.device_prefix_len))
    return whole, tuple(missing)


def match(
    original: Callable[..., MatchResult],
    req: Req,
    tree_cache: UnifiedRadixCache,
    token_ids: array | None = None,
    *,
    cow_mamba: bool = False,
    max_prefix_len: int | None = None,
) -> MatchResult:
    """AROUND `match_kv_cache`: a joined request matches what it joins and its own chain, or nothing."""
    join = joined(req)
    if join is None:
        return original(req, tree_cache, token_ids, cow_mamba=cow_mamba, max_prefix_len=max_prefix_len)
    if token_ids is None:
        token_ids = req.origin_input_ids + req.output_ids
    start = len(join.context.before)
    whole, join.missing = find(tree_cache, join.context, req.cache_salt)
    if join.missing:
        return original(req, tree_cache, array("q"), cow_mamba=cow_mamba)
    limit = None if max_prefix_len is None else max(max_prefix_len - start, 0)
    result = original(req, tree_cache, token_ids[start:], cow_mamba=cow_mamba, max_prefix_len=limit)
    req.prefix_len += start
    req.num_matched_prefix_tokens = req.prefix_len
    req.last_node = Joint(
        req.last_node, tuple((whole[piece.context], piece.lo, piece.hi) for piece in join.context.pieces)
    )
    return result


def lock(
    original: Callable[..., Any], cache: UnifiedRadixCache, node_id: int, *args: Any, **named: Any
) -> Any:
    """AROUND `UnifiedRadixCache.lock`: locking a joint locks each chain."""
    if not isinstance(node_id, Joint):
        return original(cache, node_id, *args, **named)
    nodes = [node for node, _, _ in node_id.before]
    return TreeLock(node_id, tuple(original(cache, node, *args, **named) for node in (*nodes, int(node_id))))


def unlock(original: Callable[..., None], cache: UnifiedRadixCache, held: TreeLock | None) -> None:
    """AROUND `UnifiedRadixCache.unlock`."""
    if held is None or not isinstance(held.node, Joint):
        return original(cache, held)
    for part in held.receipt:
        original(cache, part)


def slots(original: Callable[..., torch.Tensor], cache: UnifiedRadixCache, req: Req) -> torch.Tensor:
    """AROUND `UnifiedRadixCache.prefix_device_indices`: int64 [prefix_len]."""
    node = req.last_node
    if not isinstance(node, Joint):
        return original(cache, req)
    parts = [cache.path_device_indices(part)[lo:hi] for part, lo, hi in node.before]
    return torch.cat([*parts, cache.path_device_indices(int(node))])[: req.prefix_len]


def keep(
    original: Callable[..., None], cache: UnifiedRadixCache, req: Req, *, up_to: int, **named: Any
) -> None:
    """AROUND `UnifiedRadixCache.checkpoint_into_tree`: the tree stores a joined request's own chain."""
    join = joined(req)
    if join is None:
        return original(cache, req, up_to=up_to, **named)
    start = len(join.context.before)
    protected = req.kv.cache_protected_len
    row = cache.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
    key = RadixKey(req.full_untruncated_fill_ids[start:up_to], req.extra_key, cache_salt=req.cache_salt)
    inserted = cache.insert(
        InsertParams(
            key=key,
            value=row[start:up_to].to(dtype=torch.int64, copy=True),
            prev_prefix_len=protected - start,
            inserted_len=max(req.kv.cache_inserted_len - start, 0),
            priority=req.priority or 0,
        )
    )
    # Where the tree already held a token, its slot stays and the request's was freed.
    owned = cache.path_device_indices(inserted.last_device_node)
    assert len(owned) == up_to - start >= protected - start >= 0
    cache.req_to_token_pool.write((req.kv.req_pool_idx, slice(protected, up_to)), owned[protected - start :])
    node = Joint(inserted.last_device_node, req.last_node.before)
    held, req.lock = req.lock, cache.lock(node)
    cache.unlock(held)
    req.last_node = node
    req.kv.cache_protected_len = up_to
    req.kv.cache_inserted_len = max(req.kv.cache_inserted_len, up_to)
