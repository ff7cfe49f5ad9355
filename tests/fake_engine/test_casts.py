"""The casts of the fake library against FP8's definition, number by number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.fake_engine import casts
from tests.reference import fp8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def values(rows: int, columns: int) -> Tensor:
    """Of all sizes: normal, subnormal and 0 after a cast, beyond the largest number, halfway, zero."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.exp2(torch.randint(-20, 19, (rows, columns), generator=generator).float())
    found = torch.randn(rows, columns, generator=generator) * sizes
    found[0, :6] = torch.tensor([0.0, -0.0, 17.0, 18.0, 19.0, -(2.0**-10)])
    found[1] = 0.0
    return found


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_a_cast_is_to_the_nearest_number(dtype: torch.dtype, scale: float) -> None:
    wide = values(8, 100)
    found = casts.cast(wide, torch.tensor(scale), dtype).float() * torch.tensor(scale).reciprocal()
    assert torch.equal(found, fp8.round_trip(wide, dtype, scale))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("powers_of_two", [False, True])
def test_a_scale_uses_the_whole_range(dtype: torch.dtype, powers_of_two: bool) -> None:
    limit = casts.largest(dtype)
    for amax in (0.0, 1e-30, 0.3, 1.0, 7.0, 448.0, 1e5):
        scale = casts.scale_of(torch.tensor(amax), limit, powers_of_two).item()
        assert scale == fp8.scale_of(amax, dtype, powers_of_two)
    # A number so small that float32 cannot hold the factor; nothing sensible.
    tiny = casts.scale_of(torch.tensor(1e-44), limit)
    assert tiny == torch.finfo(torch.float32).max
    for amax in ("inf", "nan"):
        assert casts.scale_of(torch.tensor(float(amax)), limit) == 1.0


def test_blocks_have_scales_of_their_own() -> None:
    wide = values(150, 200).bfloat16()
    for rows, cast in ((1, casts.cast_rows), (128, casts.cast_squares)):
        data, inverse = cast(wide, E4M3, True, 0.0)
        if rows == 1:
            each = inverse.T.repeat_interleave(128, 1)[:, :200]
        else:
            each = casts.spread(inverse, (150, 200))
        assert torch.equal(data.float() * each, fp8.blocks_round_trip(wide, E4M3, rows, 128))
