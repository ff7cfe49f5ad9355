"""Cost of a layout compared with a dense mask, and of its attention compared with causal attention.

    python -m benchmarks.mask_cost [--data FILE.parquet] [--lengths 1024 4096 16384 65536] [--dense 16384]
                                   [--attention 1024 4096] [--repeats 3] [--threads 1] [--write]

First table, packed rows of Parallel-GSM8K's traces: bytes of the layout and milliseconds to pack the traces
and to plan attention (once per row, for all layers), compared with the equivalent additive float32 mask,
built from the layout by whole-matrix operations, up to --dense tokens.

Second table, forward and backward of 8 query heads and 4 KV heads of dimension 32, float32: the training
attention of this machine compared with torch's `scaled_dot_product_attention` on as many tokens, with
`is_causal=True` and with the dense mask (built outside the measurement). Rows:

    one causal trace         nothing hidden: the overhead of the layout
    real traces, packed      a packed row of Parallel-GSM8K
    one trace, 2 x 4 paths   `isolated`, four fifths of the tokens in paths
    one trace, 1 x 8 paths   the same in one block

A ratio below 1 means that ours is faster. The ratio of CPU times is a check on machines with other load.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.rows import trace_row, visible_pairs
from benchmarks.page import Table, add_write_option, publish
from benchmarks.real_traces import Traces, additive_mask, load_traces
from benchmarks.side_by_side import alternate, ratios, spread
from megatron_parallel_r1.model.attention.dispatch import path_attention
from megatron_parallel_r1.model.attention.sdpa import plan_calls
from megatron_parallel_r1.thought.packing import PackedRow, concatenate, first_fit

HEADS, GROUPS, DIM = 8, 4, 32
VOCAB = 1000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="Parallel-GSM8K as a Parquet file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--dense", type=int, default=16384, help="longest row, in tokens, with a dense mask")
    parser.add_argument("--attention", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    add_write_option(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    traces = load_traces(args.data)
    tables = [
        making(traces, args.lengths, args.dense, args.repeats),
        attending(traces, args.attention, args.dense, args.repeats),
    ]
    publish("mask_cost", tables, f"CPU, {args.threads} thread, torch {torch.__version__}", args.write)


def making(traces: Traces, lengths: Sequence[int], dense: int, repeats: int) -> Table:
    """Size and construction time of layout and mask."""
    rows = []
    for length in lengths:
        chosen = _fill(traces, length)
        packed = concatenate(traces.rows, chosen)
        layout_KL = torch.from_numpy(packed.layout_KL)
        calls: dict[str, Callable[[], object]] = {
            "lay": partial(concatenate, traces.rows, chosen),
            "plan": partial(plan_calls, layout_KL),
        }
        if len(packed) <= dense:
            calls["dense"] = partial(additive_mask, layout_KL)
        ms = alternate({name: partial(_ms, call) for name, call in calls.items()}, repeats)
        ours = [lay + plan for lay, plan in zip(ms["lay"], ms["plan"], strict=True)]
        theirs = ["–", "–", "–"]
        if "dense" in ms:
            size = 4 * len(packed) ** 2
            theirs = [_size(size), spread(ms["dense"], ".1f"), f"{median(ratios(ms['dense'], ours)):.0f}"]
        rows.append(
            [str(len(packed)), _size(layout_KL.nbytes), spread(ms["lay"]), spread(ms["plan"]), *theirs]
        )
    return Table(
        "A layout and a dense mask of the same row",
        (
            *("tokens", "layout", "ms to pack traces", "ms to plan attention"),
            *("dense mask", "ms to build it", "times the layout's"),
        ),
        rows,
        f"{repeats} repeats; median (lowest to highest). {traces.source}. No dense mask is built for "
        f"more than {dense} tokens.",
    )


def attending(traces: Traces, lengths: Sequence[int], dense: int, repeats: int) -> Table:
    """Milliseconds of attention, forward and backward."""
    rows = []
    for length in lengths:
        synthetic = {
            "one causal trace": trace_row(length, "sequential", VOCAB),
            "one trace, 2 x 4 paths": trace_row(length, "isolated", VOCAB, 2, 4),
            "one trace, 1 x 8 paths": trace_row(length, "isolated", VOCAB, 1, 8),
        }
        packed = {name: concatenate([row], [0]) for name, row in synthetic.items()}
        packed["real traces, packed"] = concatenate(traces.rows, _fill(traces, length))
        for name, row in packed.items():
            rows.append([str(len(row)), name, *_attention(row, dense, repeats)])
    return Table(
        "Attention, forward and backward",
        (
            *("tokens", "row", "share of causal pairs", "ms", "ms of causal SDPA", "ours by causal"),
            *("the same in CPU time", "ours by dense mask"),
        ),
        rows,
        f"{repeats} repeats; median (lowest to highest). {HEADS} query heads on {GROUPS} of {DIM}, float32; "
        f"real rows are of {traces.source}.",
    )


def _attention(packed: PackedRow, dense: int, repeats: int) -> list[str]:
    layout_KL = torch.from_numpy(packed.layout_KL)
    *parts, grad_LHD = (torch.randn(len(packed), heads, DIM) for heads in (HEADS, GROUPS, GROUPS, HEADS))
    leaves = [part.requires_grad_() for part in parts]
    cpu: dict[str, list[float]] = {}

    def both(name: str, attend: Callable[..., Tensor]) -> float:
        began = time.process_time()
        ms = _ms(lambda: torch.autograd.grad(attend(*leaves), leaves, grad_LHD))
        cpu.setdefault(name, []).append(time.process_time() - began)
        return ms

    def ours(*parts: Tensor) -> Tensor:
        # A new layout each time, as in training: the plan must not come from a cache.
        return path_attention(*parts, layout_KL.clone(), DIM**-0.5)

    ways: dict[str, Callable[..., Tensor]] = {"ours": ours, "causal": partial(_sdpa, is_causal=True)}
    if len(packed) <= dense:
        ways["dense"] = partial(_sdpa, attn_mask=additive_mask(layout_KL))
    ms = alternate({name: partial(both, name, way) for name, way in ways.items()}, repeats)
    share = visible_pairs(packed.layout_KL) / (len(packed) * (len(packed) + 1) / 2)
    return [
        f"{share:.2f}",
        spread(ms["ours"], ".0f"),
        spread(ms["causal"], ".0f"),
        spread(ratios(ms["ours"], ms["causal"])),
        spread(ratios(cpu["ours"][1:], cpu["causal"][1:])),
        spread(ratios(ms["ours"], ms["dense"])) if "dense" in ms else "–",
    ]


def _sdpa(query_LHD: Tensor, key_LGD: Tensor, value_LGD: Tensor, **sight: bool | Tensor) -> Tensor:
    batch = [part.transpose(0, 1)[None] for part in (query_LHD, key_LGD, value_LGD)]
    return F.scaled_dot_product_attention(*batch, enable_gqa=True, **sight)[0].transpose(0, 1)


def _fill(traces: Traces, length: int) -> list[int]:
    """Indices of traces, repeated if needed, that pack into a row of nearly `length` tokens."""
    rows = traces.rows * (1 + length // sum(map(len, traces.rows)))
    chosen = first_fit([len(row) for row in rows], length)
    return [index % len(traces.rows) for index in chosen[(len(chosen) - 1) // 2]]


def _ms(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


if __name__ == "__main__":
    main()
