"""Everything that only a GPU can tell, in one command:

    python -m benchmarks.gpu.run [--document docs/performance.md] [--tune]

from the root of the repository, on a machine with CUDA. First whether the results are right, then how they
compare with FlashAttention, with a dense mask and with each other. The tables go to the screen and into the
document, between its marks, with the date and the card. `--tune` instead times other tile sizes of the Triton
kernels (megatron_parallel_r1/model/attention/kernels/tilings.py). Without CUDA it says so, with exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch

from benchmarks.gpu import attention, models, tune
from benchmarks.gpu.sizes import FULL, Sizes
from benchmarks.gpu.tables import Table, replace_section
from megatron_parallel_r1.model import process


def tables(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    """All measurements; the caller has started the process (`process.running`)."""
    for measure in (
        attention.correctness,
        models.against_transformers,
        models.rollout_against_trainer,
        attention.ratios,
        models.steps,
        models.decoding,
    ):
        yield measure(sizes, device)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--document", type=Path, default=Path("docs/performance.md"))
    parser.add_argument("--tune", action="store_true")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/gpu: no CUDA device here; run it on a machine that has one", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    if chosen.tune:
        print(tune.table(FULL, device).markdown())
        return 0
    properties = torch.cuda.get_device_properties(device)
    heading = (
        f"## On a GPU\n\n{date.today()}, {properties.name} of {properties.total_memory / 2**30:.0f} GiB, "
        f"torch {torch.__version__}. Made by `python -m benchmarks.gpu.run`.\n"
    )
    written = [heading]
    with process.running(seed=1):
        for table in tables(FULL, device):
            print(table.markdown(), flush=True)
            written.append(table.markdown())
            # Each as soon as it is there: a measurement that fails does not take the others with it.
            replace_section(chosen.document, "\n".join(written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
