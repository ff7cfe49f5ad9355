"""What both gradients need of a query: the sum over D of the output times its gradient.

Equal to the sum over keys of weight times its gradient (arXiv 2205.14135, appendix B.2). torch would make
float32 copies of both tensors on the way.

Shapes: as in forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_parallel_r1.model.attention.kernels.tile import read


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
