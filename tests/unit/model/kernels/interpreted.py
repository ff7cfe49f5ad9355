"""Runs the Triton kernels in Triton's interpreter and prints, as JSON, how far they are from the definition.

A process of its own: TRITON_INTERPRET=1 must stand before Triton is imported, and holds for good.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_parallel_r1.model.attention import triton_attention
from megatron_parallel_r1.model.attention.dispatch import path_attention
from megatron_parallel_r1.model.attention.triton_attention import MIN_PROGRAMS, kernel_attention
from megatron_parallel_r1.model.attention.triton_tilings import Tiling, Tilings
from megatron_parallel_r1.thought.packing import context_indices
from tests.unit.model.kernels.dense import Attended, dense_attended, dense_attention
from tests.unit.model.kernels.layouts import layouts

# Small and uneven, so that short rows have whole tiles, tiles that need a mask, skipped and broken ones.
SMALL = Tilings(Tiling(64, 32, 4, 2), Tiling(32, 64, 4, 2), Tiling(64, 32, 4, 2))


@dataclass(frozen=True)
class Case:
    """One run: a layout, the share of it that this process has, heads and numbers.

    `busy` says whether there are enough programs (launch.MIN_PROGRAMS) for one to take all heads of a group;
    `strided`, whether keys and values are views of one tensor, as Megatron splits them, and queries and
    gradients lie head by head.
    """

    layout: str
    heads: int
    groups: int
    dim: int
    dtype: torch.dtype
    parts: int = 1
    busy: bool = False
    strided: bool = False

    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        part = f"/cp{self.parts}" if self.parts > 1 else ""
        part += "/busy" if self.busy else ""
        part += "/strided" if self.strided else ""
        return f"{self.layout}{part}/{self.heads}:{self.groups}x{self.dim}/{dtype}"


def cases() -> Iterator[Case]:
    for layout in layouts():
        for dtype in (torch.float32, torch.bfloat16):
            yield Case(layout, 2, 1, 32, dtype)
    for heads, groups, dim in ((1, 1, 64), (2, 2, 8), (6, 2, 16), (2, 1, 80), (1, 1, 128)):
        yield Case("causal", heads, groups, dim, torch.float32)
    yield Case("packed", 4, 2, 16, torch.bfloat16, strided=True)
    yield Case("nested", 1, 1, 128, torch.bfloat16)
    yield Case("nested", 4, 2, 16, torch.float32, busy=True)
    for layout, parts in (("packed", 2), ("isolated", 4), ("replay", 2)):
        yield Case(layout, 2, 1, 32, torch.float32, parts=parts)


def run(case: Case) -> dict[str, float]:
    """The largest difference of each result from the definition, by the largest number of that result."""
    triton_attention.MIN_PROGRAMS = 0 if case.busy else MIN_PROGRAMS
    layout_KL, sees_LL = layouts()[case.layout]
    length = layout_KL.shape[1] // (2 * case.parts) * 2 * case.parts
    layout_KL, sees_LL = layout_KL[:, :length], sees_LL[:length, :length]
    generator = torch.Generator().manual_seed(length)
    sizes = [(length, case.heads, case.dim), *2 * [(length, case.groups, case.dim)]]
    query, key, value = (torch.randn(*s, generator=generator).to(case.dtype) for s in sizes)
    grad = torch.randn(sizes[0], generator=generator).to(case.dtype)
    if case.strided:
        key, value = torch.stack([key, value], 2).unbind(2)
        query, grad = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, grad))
    errors: dict[str, float] = {}
    key_grads, value_grads = torch.zeros(key.shape).double(), torch.zeros(key.shape).double()
    expected = dense_attended(query, key, value, grad, sees_LL, case.dim**-0.5)
    for rank in range(case.parts):
        here = torch.from_numpy(context_indices(length, rank, case.parts))
        own = (query, grad) if case.parts == 1 else (query[here], grad[here])
        leaves = [x.detach().requires_grad_() for x in (own[0], key, value)]
        out, lse = kernel_attention(*leaves, layout_KL[:, here], case.dim**-0.5, SMALL)
        out.backward(own[1])
        assert out.dtype == leaves[0].grad.dtype == case.dtype
        key_grads += leaves[1].grad
        value_grads += leaves[2].grad
        ours = Attended(out.detach(), lse, leaves[0].grad, key_grads, value_grads)
        theirs = expected._replace(
            out=expected.out[here], lse=expected.lse[:, here], query_grad=expected.query_grad[here]
        )
        last = rank == case.parts - 1  # Only now all queries have given their part.
        for name in Attended._fields if last else Attended._fields[:3]:
            computed, exact = getattr(ours, name), getattr(theirs, name)
            error = ((computed - exact).abs().max() / exact.abs().max()).item()
            errors[name] = max(errors.get(name, 0.0), error)
    return errors


def chosen_by_name() -> float:
    """The error of the model's own call, with the tiles that a GPU gets."""
    layout_KL, sees_LL = layouts()["replay"]
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(len(sees_LL), heads, 16, generator=generator) for heads in (1, 1, 1)]
    expected_LHD, _ = dense_attention(*(part.double() for part in parts), sees_LL, 0.25)
    out_LHD = path_attention(*parts, layout_KL, 0.25, "triton")
    return ((out_LHD - expected_LHD).abs().max() / expected_LHD.abs().max()).item()


def worst(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The largest of each result's errors, by dtype."""
    by_dtype: dict[str, dict[str, float]] = {}
    for name, errors in found.items():
        most = by_dtype.setdefault(name.rpartition("/")[2], dict.fromkeys(errors, 0.0))
        most.update({result: max(most[result], error) for result, error in errors.items()})
    return by_dtype


if __name__ == "__main__":
    found = {case.name(): run(case) for case in cases()}
    print(json.dumps({"cases": found, "worst": worst(found), "chosen": chosen_by_name()}))
