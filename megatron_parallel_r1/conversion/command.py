"""The commands of `checkpoints_tools/`: flags, progress bar, and final message.

They return the exit code: 0, or 1 if two models differ or a file is damaged; a `UserError` becomes 2.
Function bodies import what they need, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.hub import local_folder

if TYPE_CHECKING:
    import torch

RESUME = "the same command continues with the files that are missing"
DTYPES = ("keep", "bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class ConversionBar:
    """The progress bar of a conversion."""

    progress: Progress
    task: TaskID

    def begin(self, total: int) -> None:
        self.progress.update(self.task, total=total)

    def advance(self, count: int) -> None:
        self.progress.advance(self.task, count)


def hf_to_megatron_command(words: Sequence[str] | None = None) -> int:
    """`hf_to_megatron.py`."""
    parser = _parser("Convert a Hugging Face folder to a distributed checkpoint of Megatron, in one process.")
    parser.add_argument("source", type=local_folder, help="a folder of Hugging Face's format, or a Hub name")
    _out(parser)
    for name, what in (("tensor", "each matrix"), ("pipeline", "the layers"), ("expert", "the experts")):
        parser.add_argument(f"--{name}", type=int, default=1, help=f"ranks that split {what}")
    args = parser.parse_args(words)
    from megatron_parallel_r1.conversion.shard_plan import Target
    from megatron_parallel_r1.conversion.to_megatron import hf_to_megatron

    target = Target(args.tensor, args.pipeline, args.expert)
    with _bar("writing") as bar:
        hf_to_megatron(
            args.source, args.out, target, _dtype(args.dtype), args.replace, bar.advance, bar.begin
        )
    _console().print(f"{args.out} is complete; its files and their digests are in SHA256SUMS", soft_wrap=True)
    return 0


def megatron_to_hf_command(words: Sequence[str] | None = None) -> int:
    """`megatron_to_hf.py`."""
    parser = _parser("Convert a distributed checkpoint of Megatron to a Hugging Face folder, in one process.")
    parser.add_argument("source", type=Path, help="a checkpoint by hf_to_megatron.py, a run or Megatron-LM")
    _out(parser)
    _like(parser)
    _shards(parser)
    args = parser.parse_args(words)
    from megatron_parallel_r1.conversion.to_hf import megatron_to_hf

    with _bar("writing") as bar:
        megatron_to_hf(
            args.source,
            args.out,
            args.like,
            _dtype(args.dtype),
            _shard_bytes(args.shard_gb),
            args.replace,
            bar.advance,
            bar.begin,
        )
    _console().print(f"{args.out} is complete; its files and their digests are in SHA256SUMS", soft_wrap=True)
    return 0


def verify_command(words: Sequence[str] | None = None) -> int:
    """`verify.py`."""
    parser = _parser("Compare two checkpoints of either format; exit code 1 if the models differ.")
    parser.add_argument("first", type=local_folder)
    parser.add_argument("second", type=local_folder)
    _like(parser)
    parser.add_argument("--no-logits", action="store_true", help="compare tensors only: less memory")
    args = parser.parse_args(words)
    from megatron_parallel_r1.architecture.weight_table import weight_table
    from megatron_parallel_r1.conversion.checkpoint_source import CheckpointSource, open_source
    from megatron_parallel_r1.conversion.verify import compare_configs, compare_logits, compare_tensors

    def opened(path: Path) -> CheckpointSource:
        return open_source(path, None if (path / "config.json").is_file() else args.like)

    first, second, console = opened(args.first), opened(args.second), _console()
    differences = compare_configs(first, second)
    if not differences:
        count = sum(len(weight.parts) for weight in weight_table(first.config))
        with _bar("comparing tensors", count=True) as bar:
            bar.begin(count)
            differences = compare_tensors(first, second, bar.advance)
        if not differences:
            console.print(f"all {count} tensors are bit-equal")
    if not differences and not args.no_logits:
        gaps, differences = compare_logits(first, second)
        for what, gap in gaps.items():
            console.print(f"logits, {what}: at most {gap:.1e} apart", soft_wrap=True)
    for line in differences[:20]:
        console.print(f"different: {line}", soft_wrap=True, highlight=False)
    if differences[20:]:
        console.print(f"and {len(differences) - 20} more differences")
    return 1 if differences else 0


def inspect_command(words: Sequence[str] | None = None) -> int:
    """`inspect_checkpoint.py`."""
    parser = _parser("Show the contents of a checkpoint; with --check exit code 1 if a file is damaged.")
    parser.add_argument("path", type=local_folder)
    _like(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--check", action="store_true", help="read all files and verify their digests")
    args = parser.parse_args(words)
    from megatron_parallel_r1.conversion.inspection import bytes_to_check, check_digests, facts, tensor_lines

    console = _console()
    for name, fact in facts(args.path, args.like):
        console.print(f"{name:<14} {fact}", soft_wrap=True, highlight=False)
    if args.tensors:
        for line in tensor_lines(args.path):
            console.print(line, soft_wrap=True, highlight=False)
    damaged: list[str] = []
    if args.check:
        with _bar("reading") as bar:
            bar.begin(bytes_to_check(args.path))
            damaged = check_digests(args.path, bar.advance)
    if args.check and not damaged:
        console.print("every file has its recorded digest")
    for line in damaged:
        console.print(f"damaged: {line}", soft_wrap=True, highlight=False)
    return 1 if damaged else 0


def release_command(words: Sequence[str] | None = None) -> int:
    """`release.py`."""
    parser = _parser("Write a folder to upload: weights, tokenizer with tags, decoding settings, model card.")
    parser.add_argument("source", type=Path, help="a run folder, or a checkpoint of either format")
    _out(parser)
    _like(parser)
    _shards(parser)
    parser.add_argument("--run", type=Path, help="the run that trained it, for settings, recipe and metrics")
    parser.add_argument("--stage", help="the last training stage, if the path does not name it")
    parser.add_argument("--thinking", type=Path, help="a thinking.json, if no run has the settings")
    parser.add_argument(
        "--evaluation", type=Path, action="append", default=[], help="a .md table of eval/run.py; repeatable"
    )
    args = parser.parse_args(words)
    from megatron_parallel_r1.conversion.release import ReleaseInputs, write_release

    evaluations = tuple(args.evaluation)
    inputs = ReleaseInputs(args.source, args.like, args.run, args.stage, args.thinking, evaluations)
    with _bar("writing") as bar:
        write_release(
            inputs,
            args.out,
            _dtype(args.dtype),
            _shard_bytes(args.shard_gb),
            args.replace,
            bar.advance,
            bar.begin,
        )
    _console().print(f"{args.out} is ready; read its README.md before you upload it", soft_wrap=True)
    return 0


def _parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, epilog="See docs/checkpoints.md.")


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="the new folder; after a kill the same command continues it")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="cast all weights (default: keep)")
    parser.add_argument("--replace", action="store_true", help="replace an existing folder")


def _like(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--like", type=Path, help="a folder with config.json and tokenizer, if missing")


def _shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shard-gb", type=float, default=5.0, help="most GB of one safetensors file")


def _dtype(name: str) -> torch.dtype | None:
    import torch

    return None if name == "keep" else getattr(torch, name)


def _shard_bytes(gigabytes: float) -> int:
    if not gigabytes > 0:
        raise UserError(f"--shard-gb {gigabytes} must be more than 0")
    return int(gigabytes * 10**9)


def _console() -> Console:
    return Console()


@contextmanager
def _bar(what: str, count: bool = False) -> Iterator[ConversionBar]:
    numbers = (MofNCompleteColumn(),) if count else (DownloadColumn(), TransferSpeedColumn())
    columns = (TextColumn(what), BarColumn(), *numbers, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield ConversionBar(progress, progress.add_task(what, total=None))
