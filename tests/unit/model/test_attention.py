"""Tiled attention equals a dense softmax, and holds no mask."""

import pytest
import torch
from torch import Tensor

from megatron_parallel_r1.model.attention.tiled import tiled_attention
from megatron_parallel_r1.model.attention.tiles import plan_tiles, visible
from tests.unit.model.rows import Row, causal_row, random_row

ROWS = [random_row(seed, documents=1 + seed % 3, depth=1 + seed % 3) for seed in range(8)]


def inputs(length: int, heads: int, groups: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(length, heads, dim), (length, groups, dim), (length, groups, dim), (length, heads, dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def dense(query_LHD: Tensor, key_LGD: Tensor, value_LGD: Tensor, sees_LL: Tensor) -> Tensor:
    repeats = query_LHD.shape[1] // key_LGD.shape[1]
    key_LHD, value_LHD = key_LGD.repeat_interleave(repeats, 1), value_LGD.repeat_interleave(repeats, 1)
    scores_HLL = torch.einsum("qhd,khd->hqk", query_LHD, key_LHD) * query_LHD.shape[2] ** -0.5
    weights_HLL = scores_HLL.masked_fill(~sees_LL, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights_HLL, value_LHD)


def worst_difference(row: Row, heads: int, groups: int, dtype: torch.dtype, tile: int) -> float:
    *leaves, grad_LHD = inputs(len(row), heads, groups, 8, dtype)
    ours, theirs = ([x.clone().requires_grad_() for x in leaves] for _ in range(2))
    out_LHD = tiled_attention(*ours, row.layout_KL, 8**-0.5, tile)
    expected_LHD = dense(*theirs, row.sees_LL)
    out_LHD.backward(grad_LHD)
    expected_LHD.backward(grad_LHD)
    pairs = [(out_LHD, expected_LHD), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("row", ROWS, ids=len)
@pytest.mark.parametrize("tile", [5, 16, 64])
def test_equals_dense_softmax_forward_and_backward(row: Row, tile: int) -> None:
    assert worst_difference(row, 4, 2, torch.float64, tile) < 1e-13
    assert worst_difference(row, 4, 2, torch.float32, tile) < 2e-6


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (6, 2), (4, 1)])
def test_heads_share_keys(heads: int, groups: int) -> None:
    assert worst_difference(ROWS[2], heads, groups, torch.float64, 16) < 1e-13


@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_lengths_around_a_tile(length: int) -> None:
    assert worst_difference(causal_row(length), 2, 1, torch.float64, 64) < 1e-13


def test_gradcheck() -> None:
    """Two documents; the first has two paths, of which the second hides the first."""
    layout_KL = torch.tensor(
        [
            [0, 1, 2, 3, 4, 5, 6, 7, 8],
            [0, 0, 0, 0, 0, 0, 0, 7, 7],
            [0, 0, 0, 0, 1, 1, 0, 0, 0],
            [0, 0, 0, 0, 4, 4, 0, 0, 0],
        ],
        dtype=torch.int32,
    )
    leaves = [x.requires_grad_() for x in inputs(9, 2, 1, 2, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda q, k, v: tiled_attention(q, k, v, layout_KL, 0.5, 2), leaves)


def test_bfloat16_keeps_its_softmax_in_float32() -> None:
    row = ROWS[4]
    query, key, value, _ = inputs(len(row), 4, 2, 8, torch.bfloat16)
    out_LHD = tiled_attention(query, key, value, row.layout_KL, 8**-0.5)
    exact_LHD = dense(query.float(), key.float(), value.float(), row.sees_LL)
    assert out_LHD.dtype == torch.bfloat16
    assert torch.equal(out_LHD, tiled_attention(query, key, value, row.layout_KL, 8**-0.5, 16))
    assert (out_LHD - exact_LHD).abs().max() <= exact_LHD.abs().max() * 2**-8


@pytest.mark.parametrize("row", ROWS, ids=len)
@pytest.mark.parametrize("tile", [3, 16])
def test_plan_computes_all_that_is_seen(row: Row, tile: int) -> None:
    covered_LL = torch.zeros_like(row.sees_LL)
    for part in plan_tiles(row.layout_KL, len(row), tile):
        for span in part.spans:
            rows, columns = slice(part.start, part.stop), slice(span.start, span.stop)
            covered_LL[rows, columns] = True
            seen_CS = visible(row.layout_KL[:, rows], span.start, span.stop)
            assert torch.equal(seen_CS, row.sees_LL[rows, columns])
            assert span.masked or seen_CS.all()
    assert not (row.sees_LL & ~covered_LL).any()


def test_plan_skips_other_documents_and_sibling_paths() -> None:
    tile, length = 16, 160
    layout_KL = torch.zeros(4, length, dtype=torch.int32)
    layout_KL[0] = torch.arange(length)
    layout_KL[1, 80:] = 80  # two documents
    layout_KL[2, 48:80], layout_KL[3, 48:80] = 16, 48  # the second path hides the first
    plan = plan_tiles(layout_KL, length, tile)
    spans = {part.start: [(s.start, s.stop, s.masked) for s in part.spans] for part in plan}
    assert spans[64] == [(0, 16, False), (48, 64, False), (64, 80, True)]
    assert spans[96] == [(80, 96, False), (96, 112, True)]


def test_a_part_of_the_queries_against_all_keys() -> None:
    """As under context parallelism: the layout's first row says which queries these are."""
    row = ROWS[5]
    query, key, value, _ = inputs(len(row), 4, 2, 8, torch.float64)
    part = slice(len(row) // 3, len(row) - 5)
    out_QHD = tiled_attention(query[part], key, value, row.layout_KL[:, part], 8**-0.5, 16)
    assert (out_QHD - dense(query, key, value, row.sees_LL)[part]).abs().max() < 1e-13


def test_memory_is_linear_in_the_row() -> None:
    saved: list[int] = []
    for length in (256, 1024):
        query, key, value, _ = (x.requires_grad_() for x in inputs(length, 2, 1, 4, torch.float32))
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            tiled_attention(query, key, value, causal_row(length).layout_KL, 1.0)
        saved.append(sum(x.numel() for x in kept))
    assert saved[1] == 4 * saved[0]
