"""Ranges of a flattened parameter, wherever they are cut, tile the whole tensor with rectangles."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_parallel_r1.train.checkpoints.sharded import TensorBlock


@pytest.mark.parametrize("seed", range(200))
def test_ranges_tile_the_tensor(seed: int) -> None:
    draw = random.Random(seed)
    rows, width, tensors = draw.randint(1, 5), draw.randint(1, 5), draw.randint(1, 3)
    kept = draw.randint(1, rows * tensors)  # rows of the whole; those after it are padding
    by_rows = draw.random() < 0.5
    if not by_rows:
        kept = rows
    whole = (kept, width) if by_rows else (rows, width * tensors)
    expected = torch.arange(whole[0] * whole[1]).view(whole)
    found = torch.full(whole, -1)
    for rank in range(tensors):
        corner = (rank * rows, 0) if by_rows else (0, rank * width)
        own = expected[corner[0] :][:rows, corner[1] : corner[1] + width]
        before, padding = draw.randint(0, 4), rows - len(own)
        # A parameter in which something else comes before and after the block.
        own_N = torch.cat([own.flatten(), torch.full((padding * width,), -2)])
        memory_N = torch.cat([torch.full((before,), -3), own_N, torch.full((draw.randint(0, 4),), -3)])
        block = TensorBlock("weight", whole, corner, len(own), width, before, (0, 0, 0))
        cuts = sorted(draw.randint(0, len(memory_N)) for _ in range(draw.randint(0, 3)))
        for start, stop in zip([0, *cuts], [*cuts, len(memory_N)], strict=True):
            parts = list(block.parts(memory_N[start:stop], start, "name."))
            assert len(parts) <= 3
            for part in parts:
                assert part.key == "name.weight" and part.global_shape == whole
                assert part.data.untyped_storage().data_ptr() == memory_N.untyped_storage().data_ptr()
                (row, column), (height, columns) = part.global_offset, part.local_shape
                into = found[row : row + height, column : column + columns]
                assert bool((into == -1).all())
                into.copy_(part.data)
    assert torch.equal(found, expected)


def test_a_vector_is_cut_like_a_row() -> None:
    memory_N = torch.arange(10)
    block = TensorBlock("norm", (10,), (0,), 1, 10, 0, (0, 1, 2))
    (part,) = block.parts(memory_N[3:7], 3, replica=(0, 1, 0))
    assert (part.global_offset, part.local_shape, part.replica_id) == ((3,), (4,), (0, 1, 0))
    assert part.data.tolist() == [3, 4, 5, 6]
    assert list(block.parts(memory_N[:0], 3)) == []
