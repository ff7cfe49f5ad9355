"""Helpers of the kernels: loads and stores of tiles, their mask, and their products.

Shapes: M queries, N keys of a tile, F head dimension rounded up to a power of two.
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
