"""Attention forward: FlashAttention-2 (arXiv 2307.08691) that skips tiles that no query sees.

Shapes: Q queries, L keys, H query heads in G groups that share a key/value head, D head dimension, F = D
rounded up to a power of two; M queries of a program, N keys of a step. Scores are in base 2: exp2 is one
instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_parallel_r1.model.attention.kernels.tile import product, read, seen, write


@triton.jit(do_not_specialize=["queries", "keys", "list_stride"])
def forward_kernel(
    query, key, value, layout, tiles, whole_count, needed_count, out, lse2,
    scale2, queries, keys, list_stride,
    query_stride, query_head, key_stride, key_head, value_stride, value_head, out_stride, out_head, dim,
    SHARED: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """Writes out [Q, H, D] and lse2 [H, Q], the base-2 logarithm of the sum of exponentials.

    A program handles one query tile of one head and the key tiles of its list (tiles.TileLists): first the
    whole ones, without a mask. scale2 is positive.
    """
    # Late queries see most keys: started first, they do not finish last.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    first = tile * BLOCK_M
    query_M = first + tl.arange(0, BLOCK_M)
    query_MF = read(query + head * query_head, first, query_stride, queries, dim, BLOCK_M, BLOCK_D)
    key_head_at = key + head // SHARED * key_head
    value_head_at = value + head // SHARED * value_head
    none_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_MF = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    most_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    wanted = tiles + tl.cast(tile, tl.int64) * list_stride
    whole, needed = tl.load(whole_count + tile), tl.load(needed_count + tile)
    for masked in tl.static_range(2):
        for n in range(whole if masked else 0, needed if masked else whole):
            key_first = tl.load(wanted + n) * BLOCK_N
            key_NF = read(key_head_at, key_first, key_stride, keys, dim, BLOCK_N, BLOCK_D)
            scores_MN = product(query_MF, tl.trans(key_NF), none_MN, EMULATED)
            if masked:
                key_N = key_first + tl.arange(0, BLOCK_N)
                sees_MN = seen(layout, queries, query_M, key_N, LEVELS, False)
                scores_MN = tl.where(sees_MN, scores_MN, float("-inf"))
            # Scaled once a row here, and below in one instruction with the subtraction.
            larger_M = tl.maximum(most_M, tl.max(scores_MN, 1) * scale2)
            # A query without a key so far: -inf minus -inf is NaN.
            base_M = tl.where(larger_M == float("-inf"), 0.0, larger_M)
            weights_MN = tl.exp2(scores_MN * scale2 - base_M[:, None])
            shrink_M = tl.exp2(most_M - base_M)
            value_NF = read(value_head_at, key_first, value_stride, keys, dim, BLOCK_N, BLOCK_D)
            acc_MF = acc_MF * shrink_M[:, None]
            acc_MF = product(weights_MN.to(value_NF.dtype), value_NF, acc_MF, EMULATED)
            total_M = total_M * shrink_M + tl.sum(weights_MN, 1)
            most_M = larger_M
    total_M = tl.where(query_M < queries, total_M, 1.0)
    write(
        (acc_MF / total_M[:, None]), out + head * out_head, first, out_stride, queries, dim, BLOCK_M, BLOCK_D
    )
    lse_at = lse2 + tl.cast(head, tl.int64) * queries + query_M
    tl.store(lse_at, most_M + tl.log2(total_M), query_M < queries)
