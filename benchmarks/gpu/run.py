"""Everything that only a GPU can tell, in one command:

    python -m benchmarks.gpu.run [--only NAME ...] [--page docs/performance.md] [--tune]

on a machine with CUDA. First whether the results are right, then how they compare with FlashAttention, with a
dense mask and with each other. The tables go to the screen and into a section of the page, with the date and
the card. `--only` makes some of them, and leaves the page alone unless it is named. `--tune` instead times
other tile sizes of the Triton kernels (megatron_parallel_r1/model/attention/kernels/tilings.py).

Exit codes: 1, something is wrong or could not be measured; 2, there is no CUDA device.
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
    found = attention.timings(sizes, device)
    return [attention.ratios(found), targets(found)]


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
    """The measurements; the caller has started the process (`process.running`).

    One that fails is told on standard error and by a table, and the others go on.
    """
    for name in names:
        try:
            yield from MEASURES[name](sizes, device)
        except Exception as failed:  # whatever it is: time on a GPU is dear
            traceback.print_exc()
            told = " ".join(str(failed).split()).replace("|", "/")[:200]
            yield Table(f"{name} {FAILED}", ("error",), [[f"{type(failed).__name__}: {told}"]])


def is_wrong(table: Table) -> bool:
    """Whether a result is beyond its limit, or is not there."""
    return table.title.endswith(FAILED) or any("NO" in row for row in table.rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), metavar="NAME", help=", ".join(MEASURES))
    parser.add_argument("--page", type=Path, help="default: docs/performance.md, if all is measured")
    parser.add_argument("--tune", action="store_true")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/gpu: no CUDA device here; run it on a machine that has one", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    if chosen.tune:
        print(tune.table(FULL, device).markdown())
        return 0
    page = chosen.page or (None if chosen.only else PAGE)
    properties = torch.cuda.get_device_properties(device)
    heading = (
        f"## On a GPU\n\n{date.today()}, {properties.name} of {properties.total_memory / 2**30:.0f} GiB, "
        f"torch {torch.__version__}. Made by `python -m benchmarks.gpu.run`.\n"
    )
    print(heading)
    written, wrong = [heading], False
    with process.running(seed=1):
        for table in tables(FULL, device, chosen.only or tuple(MEASURES)):
            print(table.markdown(), flush=True)
            written.append(table.markdown())
            wrong |= is_wrong(table)
            if page:  # Each as soon as it is there: whatever ends this run does not take them with it.
                replace_section(page, "gpu", "\n".join(written))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
