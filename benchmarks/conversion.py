"""Throughput, CPU time and peak memory of conversion, compared with a plain copy and with mbridge.

    python -m benchmarks.conversion [--gigabytes 4] [--rounds 2] [--folder DIR] [--write]

A random Qwen3 with the widths of 1.7B and untied embeddings, in bfloat16. Each round copies its folder,
converts it to Megatron for tensor 2 x pipeline 2, and converts that back; each in its own process, whose peak
resident memory the kernel reports. The copy is `shutil.copyfile` and fsync of each file; a conversion also
hashes and syncs its output. Before each run the input files are evicted from the page cache. Times exclude
the process's imports; whole-process times are in brackets. CPU seconds sum all threads and are far less
sensitive to other load on the machine.

If mbridge is installed (see `mbridge_peer.py`), it converts the same model both ways in each round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from benchmarks import mbridge_peer
from benchmarks.page import Table, add_write_option, publish
from benchmarks.side_by_side import ratios, spread
from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import weight_table
from megatron_parallel_r1.checkpoint_formats.hf_folder import save_hf_folder
from megatron_parallel_r1.checkpoint_formats.safetensors_file import stored_tensors

SHAPE = ModelConfig(2048, 28, 16, 8, 128, 6144, vocab=151936, tied=False, max_positions=40960)
ROOT = Path(__file__).resolve().parents[1]
COPY = """
import shutil
def copy(source, target):
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as stream:
            os.fsync(stream.fileno())
"""
OURS = """
from megatron_parallel_r1.conversion.shard_plan import Target
from megatron_parallel_r1.conversion.to_hf import megatron_to_hf
from megatron_parallel_r1.conversion.to_megatron import hf_to_megatron
"""
THEIRS = """
from benchmarks import mbridge_peer
import mbridge, megatron.core.dist_checkpointing
"""
# Setup code, timed code, source folder, target folder.
WORK = {
    "copy": (COPY, "copy(a, b)", "hf", "copy"),
    "hf to megatron": (OURS, "hf_to_megatron(a, b, Target(2, 2))", "hf", "megatron"),
    "megatron to hf": (OURS, "megatron_to_hf(a, b)", "megatron", "back"),
}
PEER = {
    "mbridge, there": (THEIRS, "mbridge_peer.to_megatron(a, b)", "hf", "theirs"),
    "mbridge, back": (THEIRS, "mbridge_peer.to_hf(a.parent / 'hf', a, b)", "theirs", "theirs_back"),
}
CHILD = """
import json, os, resource, sys, time
from pathlib import Path
{imports}
def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
def cpu():
    of = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in of)
a, b = map(Path, sys.argv[1:])
begin, used, idle = time.perf_counter(), cpu(), peak()
{work}
print(json.dumps([time.perf_counter() - begin, cpu() - used, idle, peak()]))
"""


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds of the work, its CPU and the whole process; resident bytes before the work and at the peak."""

    seconds: float
    cpu: float
    whole: float
    idle: int
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="scratch folder; needs about four times --gigabytes")
    add_write_option(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        shape = _shape(args.gigabytes)
        _write(folder / "hf", shape)
        size = _size(folder / "hf")
        largest = max(2 * torch.Size(weight.shape).numel() for weight in weight_table(shape))
        print(
            f"{size / 1e9:.2f} GB in {len(weight_table(shape))} weights, the largest {largest / 1e9:.2f} GB"
        )
        work = WORK | (PEER if mbridge_peer.is_here() else {})
        runs: dict[str, list[Run]] = {name: [] for name in work}
        for number in range(args.rounds):
            for name, (imports, words, source, target) in work.items():
                shutil.rmtree(folder / target, ignore_errors=True)
                child = CHILD.format(imports=imports, work=words)
                runs[name].append(_run(name, child, folder / source, folder / target))
            if number == 0:
                _check(folder)
    publish("conversion", [_table(runs, size, largest)], f"{os.cpu_count()} CPU cores and a disk", args.write)


def _check(folder: Path) -> None:
    """Asserts that all outputs hold the same tensors."""
    from safetensors import safe_open

    source, *others = (
        folder / name for name in ("hf", "copy", "back", "theirs_back") if (folder / name).exists()
    )
    with safe_open(source / "model.safetensors", "pt") as expected:
        for other in others:
            tensors = stored_tensors(sorted(other.glob("*.safetensors")))
            assert tensors.keys() == set(expected.keys()), other
            for name, stored in tensors.items():
                bits = (tensor.view(torch.int16) for tensor in (expected.get_tensor(name), stored.read()))
                assert torch.equal(*bits), (other, name)


def _shape(gigabytes: float) -> ModelConfig:
    """A shape of about that size; its number of layers is even, for two pipeline stages."""
    outer, each = (_numbers(replace(SHAPE, layers=count)) for count in (0, 1))
    return replace(SHAPE, layers=2 * max(1, round((gigabytes * 1e9 / 2 - outer) / (each - outer) / 2)))


def _numbers(shape: ModelConfig) -> int:
    return sum(torch.Size(weight.shape).numel() for weight in weight_table(shape))


def _write(folder: Path, shape: ModelConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = (
        (
            name,
            torch.randint(-(2**15), 2**15, size, generator=generator, dtype=torch.int16).view(torch.bfloat16),
        )
        for weight in weight_table(shape)
        for name, size in weight.parts
    )
    save_hf_folder(folder, shape, tensors)


def _run(name: str, child: str, source: Path, target: Path) -> Run:
    os.sync()
    for file in source.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                if hasattr(
                    os, "posix_fadvise"
                ):  # macOS has none: there it measures what the page cache holds
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", child, str(source), str(target)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    whole = time.perf_counter() - begin
    seconds, cpu, idle, peak = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{name:<15} {seconds:6.1f} s ({whole:.1f}), {cpu:.1f} s of CPU, peak {peak * 1024 / 1e9:.2f} GB",
        flush=True,
    )
    return Run(seconds, cpu, whole, idle * 1024, peak * 1024)


def _table(runs: dict[str, list[Run]], size: int, largest: int) -> Table:
    copied, rows = [run.seconds for run in runs["copy"]], []
    for name, some in runs.items():
        taken, peak = [run.seconds for run in some], max(run.peak for run in some)
        rows.append(
            (
                name,
                spread([size / 1e9 / seconds for seconds in taken]),
                spread(ratios(copied, taken)),
                f"{median(run.cpu for run in some) / size * 1e9:.2f}",
                f"{peak / 1e9:.2f}",
                f"{(peak - largest) / 1e9:.2f}",
            )
        )
    columns = ("work", "GB/s", "of the copy's rate", "CPU s per GB", "peak GB", "beside the largest weight")
    return Table(f"Conversion of {size / 1e9:.2f} GB, each in its own process", columns, rows)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
