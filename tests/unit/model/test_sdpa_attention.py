"""The fused kernel called for parts of a row equals a dense softmax, and keeps no mask."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_parallel_r1.model.attention.sdpa import KernelCall, plan_calls, sdpa_attention
from megatron_parallel_r1.model.attention.tiles import visible
from megatron_parallel_r1.thought.packing import context_indices
from tests.unit.model.kernels.dense import dense_attended
from tests.unit.model.kernels.layouts import layouts
from tests.unit.model.rows import causal_row, random_row

KINDS = list(layouts())


def inputs(queries: int, keys: int, heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(keys)
    shapes = [(queries, heads, 8), *2 * [(keys, groups, 8)], (queries, heads, 8)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def worst_difference(
    layout_KQ: Tensor,
    sees_QL: Tensor,
    dtype: torch.dtype,
    long: int,
    heads: int = 4,
    groups: int = 2,
) -> float:
    *leaves, grad_QHD = inputs(*sees_QL.shape, heads, groups, dtype)
    exact = dense_attended(*leaves, grad_QHD, sees_QL, 8**-0.5)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out_QHD = sdpa_attention(*leaves, layout_KQ, 8**-0.5, long)
    out_QHD.backward(grad_QHD)
    found = [out_QHD, *(leaf.grad for leaf in leaves)]
    wanted = [exact.out, exact.query_grad, exact.key_grad, exact.value_grad]
    return max(
        ((ours - theirs).abs().max() / theirs.abs().max()).item()
        for ours, theirs in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("long", [1, 7, 64])
@pytest.mark.parametrize("parts", [1, 2])
def test_equals_the_definition_forward_and_backward(kind: str, long: int, parts: int) -> None:
    """Also for a part of the queries, as under context parallelism."""
    layout_KL, sees_LL = layouts()[kind]
    length = len(sees_LL) // 4 * 4
    for rank in range(parts):
        here = torch.from_numpy(context_indices(length, rank, parts))
        part = layout_KL[:, here].contiguous(), sees_LL[here, :length]
        # Sums of a few hundred products, each rounded to 2^-53 and 2^-24.
        assert worst_difference(*part, torch.float64, long) < 1e-13
        assert worst_difference(*part, torch.float32, long) < 2e-6


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (6, 2), (4, 1)])
def test_heads_share_keys(heads: int, groups: int) -> None:
    row = random_row(2, documents=3, depth=3)
    assert worst_difference(row.layout_KL, row.sees_LL, torch.float64, 16, heads, groups) < 1e-13


def test_intervals_may_lie_anywhere() -> None:
    """Half in the stretch that hides them, behind it, in each other: as no trace has them."""
    length, random = 90, torch.Generator().manual_seed(5)
    layout_KL = torch.zeros(6, length, dtype=torch.int32)
    layout_KL[0] = torch.arange(length)
    for start in range(0, length, 15):
        for level in (2, 4):
            lo, hi = torch.randint(0, length, (2,), generator=random).sort().values
            layout_KL[level, start : start + 15], layout_KL[level + 1, start : start + 15] = lo, hi
    hides = [layout_KL[level : level + 2] for level in (2, 4)]
    for lo_L, hi_L in hides:
        # A token sees itself, so what lies in its own interval hides nothing.
        inside_L = (lo_L <= layout_KL[0]) & (layout_KL[0] < hi_L)
        hi_L[inside_L] = lo_L[inside_L]
    key_L = torch.arange(length)
    sees_LL = key_L <= key_L[:, None]
    for lo_L, hi_L in hides:
        sees_LL &= ~((lo_L[:, None] <= key_L) & (key_L < hi_L[:, None]))
    for long in (1, 10, 64):
        assert worst_difference(layout_KL, sees_LL, torch.float64, long) < 1e-13


def test_gradcheck() -> None:
    row = random_row(1, documents=2, depth=1)
    query, key, value, _ = inputs(len(row), len(row), 2, 1, torch.float64)
    leaves = [x[..., :2].contiguous().requires_grad_() for x in (query, key, value)]
    assert torch.autograd.gradcheck(lambda q, k, v: sdpa_attention(q, k, v, row.layout_KL, 0.5, 8), leaves)


def test_bfloat16_keeps_its_softmax_in_float32() -> None:
    row = random_row(4, documents=2, depth=2)
    query, key, value, _ = inputs(len(row), len(row), 4, 2, torch.bfloat16)
    out_LHD = sdpa_attention(query, key, value, row.layout_KL, 8**-0.5)
    wide_LHD = sdpa_attention(query.float(), key.float(), value.float(), row.layout_KL, 8**-0.5)
    assert out_LHD.dtype == torch.bfloat16
    assert torch.equal(out_LHD, wide_LHD.bfloat16())


def test_a_stretch_hidden_from_a_call_takes_no_gradient() -> None:
    """Two paths behind a prompt, then one more token: only it reads the first path."""
    layout_KL = torch.zeros(4, 300, dtype=torch.int32)
    layout_KL[0] = torch.arange(300)
    layout_KL[2, 200:299], layout_KL[3, 200:299] = 100, 200
    *leaves, grad_LHD = inputs(300, 300, 2, 1, torch.float32)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    sdpa_attention(*leaves, layout_KL, 1.0)[200:299].backward(grad_LHD[200:299])
    assert not leaves[1].grad[100:200].any() and leaves[1].grad[:100].any()


def covered(calls: tuple[KernelCall, ...], layout_KQ: Tensor, keys: int) -> Tensor:
    """[M, L]: how often each pair of these queries is computed."""
    start, stop = calls[0].start, calls[0].stop
    count_ML = torch.zeros(stop - start, keys, dtype=torch.int64)
    for call in calls:
        assert (call.start, call.stop) == (start, stop)
        for lo, hi in call.spans:
            seen = {
                "whole": torch.ones(stop - start, hi - lo),
                "causal": torch.ones(stop - start, hi - lo).tril(),
                "layout": visible(layout_KQ[:, start:stop], lo, hi),
            }[call.mask]
            count_ML[:, lo:hi] += seen.long()
    return count_ML


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("long", [1, 16, 64])
def test_a_plan_computes_what_is_seen_once(kind: str, long: int) -> None:
    layout_KL, sees_LL = layouts()[kind]
    plan = plan_calls(layout_KL, long)
    bounds = [(calls[0].start, calls[0].stop) for calls in plan]
    assert bounds[0][0] == 0 and bounds[-1][1] == len(sees_LL)
    assert all(before[1] == after[0] for before, after in pairwise(bounds))
    assert torch.equal(torch.cat([covered(calls, layout_KL, len(sees_LL)) for calls in plan]), sees_LL.long())


def test_long_stretches_need_no_mask() -> None:
    """A prompt, two paths, what follows them; and a second document."""
    layout_KL = torch.zeros(4, 600, dtype=torch.int32)
    layout_KL[0] = torch.arange(600)
    layout_KL[2, 200:300], layout_KL[3, 200:300] = 100, 200
    layout_KL[1, 400:] = 400
    assert plan_calls(layout_KL, 64) == [
        (KernelCall(0, 200, ((0, 200),), "causal"),),
        (KernelCall(200, 300, ((0, 100),), "whole"), KernelCall(200, 300, ((200, 300),), "causal")),
        (KernelCall(300, 400, ((0, 300),), "whole"), KernelCall(300, 400, ((300, 400),), "causal")),
        (KernelCall(400, 600, ((400, 600),), "causal"),),
    ]


def test_memory_is_linear_in_the_row() -> None:
    saved: list[int] = []
    for length in (256, 1024):
        query, key, value, _ = (x.requires_grad_() for x in inputs(length, length, 2, 1, torch.float32))
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            sdpa_attention(query, key, value, causal_row(length).layout_KL, 1.0)
        saved.append(sum(x.numel() for x in kept))
    assert saved[1] == 4 * saved[0]
