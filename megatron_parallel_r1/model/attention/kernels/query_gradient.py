"""The gradient of the queries: the forward's walk once more, with the weights made anew from its sums.

Shapes: as in forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_parallel_r1.model.attention.kernels.tile import product, read, seen, write


@triton.jit(do_not_specialize=["queries", "keys", "list_stride"])
def query_gradient_kernel(
    query, key, value, grad, layout, tiles, whole_count, needed_count, lse2, delta, query_grad,
    scale, scale2, queries, keys, list_stride,
    query_stride, query_head, key_stride, key_head, value_stride, value_head, grad_stride, grad_head,
    out_stride, out_head, dim,
    SHARED: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """Writes query_grad [Q, H, D]; delta [H, Q] is the sum over D of the output times its gradient."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    first = tile * BLOCK_M
    query_M = first + tl.arange(0, BLOCK_M)
    query_MF = read(query + head * query_head, first, query_stride, queries, dim, BLOCK_M, BLOCK_D)
    grad_MF = read(grad + head * grad_head, first, grad_stride, queries, dim, BLOCK_M, BLOCK_D)
    numbers_M = tl.cast(head, tl.int64) * queries + query_M
    lse_M = tl.load(lse2 + numbers_M, query_M < queries, other=float("inf"))
    delta_M = tl.load(delta + numbers_M, query_M < queries, other=0.0)
    key_head_at = key + head // SHARED * key_head
    value_head_at = value + head // SHARED * value_head
    none_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_MF = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    wanted = tiles + tl.cast(tile, tl.int64) * list_stride
    whole, needed = tl.load(whole_count + tile), tl.load(needed_count + tile)
    for masked in tl.static_range(2):
        for n in range(whole if masked else 0, needed if masked else whole):
            key_first = tl.load(wanted + n) * BLOCK_N
            key_NF = read(key_head_at, key_first, key_stride, keys, dim, BLOCK_N, BLOCK_D)
            value_NF = read(value_head_at, key_first, value_stride, keys, dim, BLOCK_N, BLOCK_D)
            scores_MN = product(query_MF, tl.trans(key_NF), none_MN, EMULATED) * scale2
            if masked:
                key_N = key_first + tl.arange(0, BLOCK_N)
                sees_MN = seen(layout, queries, query_M, key_N, LEVELS, False)
                scores_MN = tl.where(sees_MN, scores_MN, float("-inf"))
            weights_MN = tl.exp2(scores_MN - lse_M[:, None])
            weights_grad_MN = product(grad_MF, tl.trans(value_NF), none_MN, EMULATED)
            scores_grad_MN = weights_MN * (weights_grad_MN - delta_M[:, None])
            acc_MF = product(scores_grad_MN.to(key_NF.dtype), key_NF, acc_MF, EMULATED)
    write((acc_MF * scale), query_grad + head * out_head, first, out_stride, queries, dim, BLOCK_M, BLOCK_D)
