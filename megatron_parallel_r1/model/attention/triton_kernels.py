"""Triton kernels of attention under a layout: FlashAttention-2 (arXiv 2307.08691) that skips tiles no query
sees, and its backward.

Both gradients need delta, the sum over D of the output times its gradient, which equals the sum over keys of
weight times its gradient (arXiv 2205.14135, appendix B.2). torch would make float32 copies of both tensors.

Shapes: Q queries, L keys, H query heads in G groups that share a key/value head, D head dimension, F = D
rounded up to a power of two; M queries and N keys of a tile. Scores are in base 2: exp2 is one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pointers(base, first, stride, rows, dim, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    # A row of a long tensor may begin past 2**31 elements; within a tile 32 bits suffice.
    pointers = base + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
    return pointers, (first + row < rows)[:, None] & (column < dim)[None, :]


@triton.jit
def read(base, first, stride, rows, dim, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads the tile [BLOCK, F] from row `first` on; zeros past `rows` and `dim`."""
    pointers, exists = _pointers(base, first, stride, rows, dim, BLOCK, BLOCK_D)
    return tl.load(pointers, exists, other=0.0)


@triton.jit
def write(tile, base, first, stride, rows, dim, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores a tile, the inverse of `read`, rounded to the dtype of `base`."""
    pointers, exists = _pointers(base, first, stride, rows, dim, BLOCK, BLOCK_D)
    tl.store(pointers, tile.to(base.dtype.element_ty), exists)


@triton.jit
def seen(layout, queries, query, key, LEVELS: tl.constexpr, BY_KEY: tl.constexpr):
    """Returns the mask of the pairs (thought/layout.py): [M, N], or [N, M] if BY_KEY.

    A query past the row's end sees nothing.
    """
    exists = query < queries
    key_2 = key[:, None] if BY_KEY else key[None, :]
    index = tl.load(layout + query, exists, other=-1)
    start = tl.load(layout + queries + query, exists, other=0)
    index_2 = index[None, :] if BY_KEY else index[:, None]
    start_2 = start[None, :] if BY_KEY else start[:, None]
    sees = (start_2 <= key_2) & (key_2 <= index_2)
    for level in tl.static_range(LEVELS):
        lo = tl.load(layout + (2 + 2 * level) * queries + query, exists, other=0)
        hi = tl.load(layout + (3 + 2 * level) * queries + query, exists, other=0)
        lo_2 = lo[None, :] if BY_KEY else lo[:, None]
        hi_2 = hi[None, :] if BY_KEY else hi[:, None]
        sees &= (key_2 < lo_2) | (hi_2 <= key_2)
    return sees


@triton.jit
def product(left, right, acc, EMULATED: tl.constexpr):
    """Returns acc + left @ right with float32 sums.

    Args:
        EMULATED: for Triton's interpreter, which would multiply the bits of bfloat16 numbers.
    """
    if EMULATED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


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


@triton.jit(do_not_specialize=["queries"])
def delta_kernel(
    out, grad, delta, queries, out_stride, out_head, grad_stride, grad_head, dim,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes delta [H, Q], float32."""
    first = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    out_MF = read(out + head * out_head, first, out_stride, queries, dim, BLOCK_M, BLOCK_D)
    grad_MF = read(grad + head * grad_head, first, grad_stride, queries, dim, BLOCK_M, BLOCK_D)
    sum_M = tl.sum(out_MF.to(tl.float32) * grad_MF.to(tl.float32), 1)
    query_M = first + tl.arange(0, BLOCK_M)
    tl.store(delta + tl.cast(head, tl.int64) * queries + query_M, sum_M, query_M < queries)


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
    """Writes query_grad [Q, H, D]; delta [H, Q] is the output of `delta_kernel`."""
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


@triton.jit(do_not_specialize=["queries", "keys", "list_stride"])
def key_gradient_kernel(
    query, key, value, grad, layout, tiles, whole_count, needed_count, lse2, delta, key_grad, value_grad,
    scale, scale2, queries, keys, list_stride,
    query_stride, query_head, key_stride, key_head, value_stride, value_head, grad_stride, grad_head,
    out_split, out_stride, out_head, dim,
    HEADS: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """Writes key_grad and value_grad [P, L, G, D]: the sums over each split's HEADS heads of a group."""
    tile, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tile * BLOCK_N
    key_N = first + tl.arange(0, BLOCK_N)
    key_NF = read(key + group * key_head, first, key_stride, keys, dim, BLOCK_N, BLOCK_D)
    value_NF = read(value + group * value_head, first, value_stride, keys, dim, BLOCK_N, BLOCK_D)
    none_NM = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    key_acc_NF = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_acc_NF = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    wanted = tiles + tl.cast(tile, tl.int64) * list_stride
    whole, needed = tl.load(whole_count + tile), tl.load(needed_count + tile)
    for share in range(HEADS):
        head = (group * tl.num_programs(2) + split) * HEADS + share
        numbers = tl.cast(head, tl.int64) * queries
        for masked in tl.static_range(2):
            for n in range(whole if masked else 0, needed if masked else whole):
                query_first = tl.load(wanted + n) * BLOCK_M
                query_M = query_first + tl.arange(0, BLOCK_M)
                query_MF = read(
                    query + head * query_head, query_first, query_stride, queries, dim, BLOCK_M, BLOCK_D
                )
                grad_MF = read(
                    grad + head * grad_head, query_first, grad_stride, queries, dim, BLOCK_M, BLOCK_D
                )
                # A query past the row's end has the weight exp2(0 - inf) = 0.
                lse_M = tl.load(lse2 + numbers + query_M, query_M < queries, other=float("inf"))
                delta_M = tl.load(delta + numbers + query_M, query_M < queries, other=0.0)
                scores_NM = product(key_NF, tl.trans(query_MF), none_NM, EMULATED) * scale2
                if masked:
                    sees_NM = seen(layout, queries, query_M, key_N, LEVELS, True)
                    scores_NM = tl.where(sees_NM, scores_NM, float("-inf"))
                weights_NM = tl.exp2(scores_NM - lse_M[None, :])
                value_acc_NF = product(weights_NM.to(grad_MF.dtype), grad_MF, value_acc_NF, EMULATED)
                weights_grad_NM = product(value_NF, tl.trans(grad_MF), none_NM, EMULATED)
                scores_grad_NM = weights_NM * (weights_grad_NM - delta_M[None, :])
                key_acc_NF = product(scores_grad_NM.to(query_MF.dtype), query_MF, key_acc_NF, EMULATED)
    offset = tl.cast(split, tl.int64) * out_split + group * out_head
    write((key_acc_NF * scale), key_grad + offset, first, out_stride, keys, dim, BLOCK_N, BLOCK_D)
    write(value_acc_NF, value_grad + offset, first, out_stride, keys, dim, BLOCK_N, BLOCK_D)
