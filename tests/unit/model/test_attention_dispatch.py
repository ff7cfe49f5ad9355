"""FlexAttention under a layout, the lists of tiles that kernels walk, and who computes what where."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.attention.dispatch import check_kernel, path_attention, resolve_kernel
from megatron_parallel_r1.model.attention.flex import block_mask, flex_attention
from megatron_parallel_r1.model.attention.tiles import (
    LayoutCache,
    TileLists,
    tile_lists,
    tile_visibility,
    transposed,
)
from megatron_parallel_r1.model.spec import restore_order
from megatron_parallel_r1.thought.packing import context_indices
from tests.unit.model.kernels.dense import dense_attention
from tests.unit.model.kernels.layouts import layouts

KINDS = list(layouts())


def inputs(queries: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(keys)
    return [torch.randn(shape, generator=generator) for shape in ((queries, 4, 16), *2 * [(keys, 2, 16)])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 2])
def test_flex_equals_the_definition(kind: str, parts: int) -> None:
    layout_KL, sees_LL = layouts()[kind]
    length = layout_KL.shape[1] // 4 * 4
    for rank in range(parts):
        here = torch.from_numpy(context_indices(length, rank, parts))
        query, key, value = inputs(len(here), length)
        out_QHD = flex_attention(query, key, value, layout_KL[:, here].contiguous(), 0.25, compiled=False)
        expected_QHD = dense_attention(query, key, value, sees_LL[here, :length], 0.25)[0]
        # float32 sums of a few hundred products, each rounded to 2^-24.
        assert (out_QHD - expected_QHD).abs().max() < 2e-6 * expected_QHD.abs().max()


@pytest.mark.slow
def test_flex_compiles_and_skips_blocks() -> None:
    """Compiled it never looks into the blocks that its mask leaves out, so they must be left out rightly."""
    layout_KL, sees_LL = layouts()["replay"]
    query, key, value = inputs(len(sees_LL), len(sees_LL))
    expected_LHD = dense_attention(query, key, value, sees_LL, 0.25)[0]
    out_LHD = flex_attention(query, key, value, layout_KL, 0.25)
    assert (out_LHD - expected_LHD).abs().max() < 2e-6 * expected_LHD.abs().max()


def test_flex_makes_more_graphs_than_torch_would_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its limit, 8 and here 1, torch would compute all pairs of a row."""
    compiled: list[None] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(None)
        return graph.forward

    attend = torch.compile(torch_flex.flex_attention, fullgraph=True, backend=backend)
    monkeypatch.setattr("megatron_parallel_r1.model.attention.flex._compiled", lambda: attend)
    expected_LHD = dense_attention(*inputs(8, 8), torch.ones(8, 8).tril().bool(), 0.25)[0]
    # By torch's own way: pytest would take the setting away at the end, for all tests behind this one.
    with torch._dynamo.config.patch(recompile_limit=1):
        for depth in range(3):
            layout_KL = torch.zeros(2 + 2 * depth, 8, dtype=torch.int32)
            layout_KL[0] = torch.arange(8)
            out_LHD = flex_attention(*inputs(8, 8), layout_KL, 0.25)
            assert (out_LHD - expected_LHD).abs().max() < 2e-6 * expected_LHD.abs().max()
    assert len(compiled) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_flex_block_mask_holds_all_that_is_seen(kind: str) -> None:
    layout_KL, sees_LL = layouts()[kind]
    seen_IJ = block_mask(layout_KL, len(sees_LL)).to_dense()[0, 0].bool()
    index_L = torch.arange(len(sees_LL)) // 128
    assert (seen_IJ[index_L][:, index_L] | ~sees_LL).all()


def test_flex_has_no_backward_on_a_cpu() -> None:
    layout_KL, _ = layouts()["causal"]
    query, key, value = inputs(layout_KL.shape[1], layout_KL.shape[1])
    with pytest.raises(UserError, match="flex has no backward on a CPU"):
        flex_attention(query.requires_grad_(), key, value, layout_KL, 0.25)


@pytest.mark.parametrize("size", [2, 3])
def test_parts_of_context_ranks_come_together_in_the_order_of_the_row(size: int) -> None:
    held = torch.cat([torch.from_numpy(context_indices(24, rank, size)) for rank in range(size)])
    assert restore_order(held, size).tolist() == list(range(24))


def covered(
    lists: TileLists, rows: int, columns: int, row_tile: int, column_tile: int
) -> tuple[Tensor, Tensor]:
    """Which pairs a kernel that walks these lists computes, and which of them without a mask."""
    needed, whole = torch.zeros(2, rows, columns, dtype=torch.bool)
    for i, (tiles_J, wholes, count) in enumerate(
        zip(lists.tiles_IJ, lists.whole_I, lists.needed_I, strict=True)
    ):
        for place, j in enumerate(tiles_J[:count].tolist()):
            here = (slice(i * row_tile, (i + 1) * row_tile), slice(j * column_tile, (j + 1) * column_tile))
            assert not needed[here].any()
            needed[here] = True
            whole[here] = place < wholes
    return needed, whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiles", [(16, 16), (32, 8), (5, 64)])
@pytest.mark.parametrize("parts", [1, 2])
def test_lists_hold_all_that_is_seen_from_either_side(kind: str, tiles: tuple[int, int], parts: int) -> None:
    layout_KL, sees_LL = layouts()[kind]
    length = len(sees_LL) // 4 * 4
    for rank in range(parts):
        here = torch.from_numpy(context_indices(length, rank, parts))
        sees_QL, (query_tile, key_tile) = sees_LL[here, :length], tiles
        sight = tile_visibility(layout_KL[:, here], length, query_tile, key_tile)
        needed_QL, whole_QL = covered(tile_lists(sight), len(here), length, query_tile, key_tile)
        needed_LQ, whole_LQ = covered(tile_lists(transposed(sight)), length, len(here), key_tile, query_tile)
        assert torch.equal(needed_QL, needed_LQ.T) and torch.equal(whole_QL, whole_LQ.T)
        assert (needed_QL | ~sees_QL).all()
        assert (sees_QL | ~whole_QL).all()


def test_lists_of_a_long_row_leave_out_what_siblings_hide() -> None:
    """Two paths of 512 behind a prompt of 512: the second skips the first, whole and half-seen tiles are as
    few as the triangle has."""
    layout_KL = torch.zeros(4, 1536, dtype=torch.int32)
    layout_KL[0] = torch.arange(1536)
    layout_KL[2, 1024:], layout_KL[3, 1024:] = 512, 1024
    lists = tile_lists(tile_visibility(layout_KL, 1536, 128, 128))
    assert lists.needed_I.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8]
    assert (lists.needed_I - lists.whole_I).tolist() == [1] * 12
    assert lists.tiles_IJ[8, :5].tolist() == [0, 1, 2, 3, 8]


def test_the_cache_forgets_with_the_layout() -> None:
    cache, computed = LayoutCache(), []
    layout_KL, _ = layouts()["packed"]
    layout_KL = layout_KL.clone()

    def compute() -> int:
        computed.append(None)
        return len(computed)

    assert cache.get(layout_KL, "a", compute) == cache.get(layout_KL, "a", compute) == 1
    assert cache.get(layout_KL, "b", compute) == 2
    layout_KL[0] += 1  # in place: another layout
    assert cache.get(layout_KL, "a", compute) == 3
    cache.get(layout_KL, "mask", partial(block_mask, layout_KL, layout_KL.shape[1]))
    del layout_KL
    gc.collect()
    assert len(cache) == 0


def test_auto_is_fused_on_a_cpu() -> None:
    query, key, value = inputs(150, 150)
    layout_KL, _ = layouts()["causal"]
    assert resolve_kernel("auto", query) == "sdpa"
    sdpa_LHD = path_attention(query, key, value, layout_KL, 0.25, "sdpa")
    assert torch.equal(path_attention(query, key, value, layout_KL, 0.25), sdpa_LHD)
    with pytest.raises(UserError, match="sdpa runs on a CPU only"):
        check_kernel("sdpa", torch.device("cuda"), 16)
    with pytest.raises(UserError, match="triton needs a CUDA device"):
        path_attention(query, key, value, layout_KL, 0.25, "triton")


def test_triton_refuses_heads_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"to 256, not 320|triton is not installed"):
        check_kernel("triton", torch.device("cuda"), 320)
