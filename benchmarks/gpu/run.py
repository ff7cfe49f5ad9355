"""All GPU measurements in one command:

    python -m benchmarks.gpu.run [--only NAME ...] [--page docs/performance.md] [--tune]

on a machine with CUDA: first correctness, then speed compared with FlashAttention, with a dense mask and
among the kernels. Prints the tables and writes them to a section of the page, with the date and the GPU.
`--only` makes some of them, and leaves the page unchanged unless `--page` is given. `--tune` instead times
other tile sizes of the Triton kernels (megatron_parallel_r1/model/attention/triton_tilings.py).

Exit codes: 1, a result is wrong or could not be measured; 2, no CUDA device.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path

import torch

from benchmarks.gpu import attention, models, tune
from benchmarks.gpu.sizes import FULL, Sizes
from benchmarks.gpu.targets import targets
from benchmarks.page import PAGE, Table, replace_section
from megatron_parallel_r1.distributed import process

Measure = Callable[[Sizes, torch.device], list[Table]]


def _attention(sizes: Sizes, device: torch.device) -> list[Table]:
    timings = attention.timings(sizes, device)
    return [attention.ratios(timings), targets(timings)]


MEASURES: dict[str, Measure] = {
    "kernels": lambda sizes, device: [attention.correctness(sizes, device)],
    "transformers": lambda sizes, device: [models.against_transformers(sizes, device)],
    "rollout": lambda sizes, device: [models.rollout_against_trainer(sizes, device)],
    "attention": _attention,
    "steps": lambda sizes, device: [models.steps(sizes, device)],
    "decoding": lambda sizes, device: [models.decoding(sizes, device)],
}
FAILED = "could not be measured"


def tables(sizes: Sizes, device: torch.device, names: Sequence[str] = tuple(MEASURES)) -> Iterator[Table]:
    """Yields the measurements' tables; the caller has started the process (`process.running`).

    A failed measurement prints its traceback and yields a table with the error; the others continue.
    """
    for name in names:
        try:
            yield from MEASURES[name](sizes, device)
        except Exception as error:  # continue whatever fails: GPU time is expensive
            traceback.print_exc()
            message = " ".join(str(error).split()).replace("|", "/")[:200]
            yield Table(f"{name} {FAILED}", ("error",), [[f"{type(error).__name__}: {message}"]])


def is_wrong(table: Table) -> bool:
    """Returns whether a result exceeds its limit or is missing."""
    return table.title.endswith(FAILED) or any("NO" in row for row in table.rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), metavar="NAME", help=", ".join(MEASURES))
    parser.add_argument("--page", type=Path, help="default: docs/performance.md, unless --only is given")
    parser.add_argument("--tune", action="store_true", help="time other tile sizes of the Triton kernels")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/gpu: no CUDA device; run it on a machine that has one", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    if args.tune:
        print(tune.table(FULL, device).markdown())
        return 0
    page = args.page or (None if args.only else PAGE)
    properties = torch.cuda.get_device_properties(device)
    heading = (
        f"## On a GPU\n\n{date.today()}, {properties.name} of {properties.total_memory / 2**30:.0f} GiB, "
        f"torch {torch.__version__}. Made by `python -m benchmarks.gpu.run`.\n"
    )
    print(heading)
    written, wrong = [heading], False
    with process.running(seed=1):
        for table in tables(FULL, device, args.only or tuple(MEASURES)):
            print(table.markdown(), flush=True)
            written.append(table.markdown())
            wrong |= is_wrong(table)
            if page:  # After each table, so that an aborted run keeps its results.
                replace_section(page, "gpu", "\n".join(written))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
