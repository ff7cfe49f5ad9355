"""The five commands of `checkpoints_tools/`: their flags, a progress bar, and what they say at the end.

They return the exit code: 0, or 1 where two models differ or a file is damaged; a `UserError` becomes 2.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_parallel_r1.conversion.shard_plan import Target
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.exit import one_line_exit

DTYPES = ("keep", "bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Bar:
    """What a conversion tells of its way."""

    progress: Progress
    task: int

    def begin(self, total: int) -> None:
        self.progress.update(self.task, total=total)

    def advance(self, count: int) -> None:
        self.progress.advance(self.task, count)


def explained(command: Callable[[], int]) -> None:
    """Runs a command and exits with its code; expected errors end in one line (utils/exit.py)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with one_line_exit("the same command continues with the files that are missing"):
        raise SystemExit(command())


def hf_to_megatron_command(words: Sequence[str] | None = None) -> int:
    """`hf_to_megatron.py`."""
    parser = _parser("A Hugging Face folder to a distributed checkpoint of Megatron, in one process.")
    parser.add_argument("source", type=Path, help="a folder with config.json and *.safetensors")
    _out(parser)
    for name, what in (("tensor", "each matrix"), ("pipeline", "the layers"), ("expert", "the experts")):
        parser.add_argument(f"--{name}", type=int, default=1, help=f"ranks that will share {what}")
    told = parser.parse_args(words)
    from megatron_parallel_r1.conversion.to_megatron import hf_to_megatron

    target = Target(told.tensor, told.pipeline, told.expert)
    with _bar("writing") as bar:
        hf_to_megatron(
            told.source, told.out, target, _dtype(told.dtype), told.replace, bar.advance, bar.begin
        )
    _console().print(f"{told.out} is complete; its files and their digests are in SHA256SUMS", soft_wrap=True)
    return 0


def megatron_to_hf_command(words: Sequence[str] | None = None) -> int:
    """`megatron_to_hf.py`."""
    parser = _parser("A distributed checkpoint of Megatron to a Hugging Face folder, in one process.")
    parser.add_argument("source", type=Path, help="what hf_to_megatron.py, a run or Megatron-LM wrote")
    _out(parser)
    _like(parser)
    _shards(parser)
    told = parser.parse_args(words)
    from megatron_parallel_r1.conversion.to_hf import megatron_to_hf

    with _bar("writing") as bar:
        megatron_to_hf(
            told.source,
            told.out,
            told.like,
            _dtype(told.dtype),
            _shard_bytes(told.shard_gb),
            told.replace,
            bar.advance,
            bar.begin,
        )
    _console().print(f"{told.out} is complete; its files and their digests are in SHA256SUMS", soft_wrap=True)
    return 0


def verify_command(words: Sequence[str] | None = None) -> int:
    """`verify.py`."""
    parser = _parser("Whether two checkpoints, each of either form, hold the same model; exit code 1 if not.")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    _like(parser)
    parser.add_argument("--no-logits", action="store_true", help="compare the tensors alone: less memory")
    told = parser.parse_args(words)
    from megatron_parallel_r1.architecture.weight_table import weight_table
    from megatron_parallel_r1.conversion.checkpoint_source import open_side
    from megatron_parallel_r1.conversion.verify import compare_logits, compare_shapes, compare_tensors

    def opened(path: Path) -> object:
        return open_side(path, None if (path / "config.json").is_file() else told.like)

    one, two, console = opened(told.first), opened(told.second), _console()
    differences = compare_shapes(one, two)
    if not differences:
        count = sum(len(weight.parts) for weight in weight_table(one.shape))
        with _bar("comparing tensors", count=True) as bar:
            bar.begin(count)
            differences = compare_tensors(one, two, bar.advance)
        if not differences:
            console.print(f"all {count} tensors are bit-equal")
    if not differences and not told.no_logits:
        apart, differences = compare_logits(one, two)
        for what, gap in apart.items():
            console.print(f"logits, {what}: at most {gap:.1e} apart", soft_wrap=True)
    for line in differences[:20]:
        console.print(f"different: {line}", soft_wrap=True, highlight=False)
    if differences[20:]:
        console.print(f"and {len(differences) - 20} more differences")
    return 1 if differences else 0


def inspect_command(words: Sequence[str] | None = None) -> int:
    """`inspect_checkpoint.py`."""
    parser = _parser("What is in a checkpoint of either form; with --check exit code 1 if a file is damaged.")
    parser.add_argument("path", type=Path)
    _like(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--check", action="store_true", help="read all files and compare their digests")
    told = parser.parse_args(words)
    from megatron_parallel_r1.conversion.digests import bytes_to_check, check_digests
    from megatron_parallel_r1.conversion.inspection import facts, tensor_lines

    console = _console()
    for name, fact in facts(told.path, told.like):
        console.print(f"{name:<14} {fact}", soft_wrap=True, highlight=False)
    if told.tensors:
        for line in tensor_lines(told.path):
            console.print(line, soft_wrap=True, highlight=False)
    wrong: list[str] = []
    if told.check:
        with _bar("reading") as bar:
            bar.begin(bytes_to_check(told.path))
            wrong = check_digests(told.path, bar.advance)
    if told.check and not wrong:
        console.print("every file has the digest that was written down")
    for line in wrong:
        console.print(f"damaged: {line}", soft_wrap=True, highlight=False)
    return 1 if wrong else 0


def release_command(words: Sequence[str] | None = None) -> int:
    """`release.py`."""
    parser = _parser("A folder ready to upload: weights, tokenizer with tags, decoding settings, model card.")
    parser.add_argument("source", type=Path, help="a run's folder, or a checkpoint of either form")
    _out(parser)
    _like(parser)
    _shards(parser)
    parser.add_argument("--run", type=Path, help="the run that trained it: settings, recipe and figures")
    parser.add_argument("--stage", help="the stage that trained it last, where its place does not tell")
    parser.add_argument("--thinking", type=Path, help="a thinking.json, where no run says how to decode")
    parser.add_argument(
        "--evaluation", type=Path, action="append", default=[], help="a table of eval/run.py (.md); repeat it"
    )
    told = parser.parse_args(words)
    from megatron_parallel_r1.conversion.release import Given, write_release

    given = Given(told.source, told.like, told.run, told.stage, told.thinking, tuple(told.evaluation))
    with _bar("writing") as bar:
        write_release(
            given,
            told.out,
            _dtype(told.dtype),
            _shard_bytes(told.shard_gb),
            told.replace,
            bar.advance,
            bar.begin,
        )
    _console().print(f"{told.out} is ready; read its README.md before you upload it", soft_wrap=True)
    return 0


def _parser(what: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=what, epilog="docs/checkpoints.md says more.")


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="the new folder; killed, the same command goes on with it")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="cast all weights (default: keep)")
    parser.add_argument("--replace", action="store_true", help="if the folder is there already")


def _like(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--like", type=Path, help="a folder with config.json and tokenizer, if it has none")


def _shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shard-gb", type=float, default=5.0, help="of one safetensors file at most")


def _dtype(name: str) -> torch.dtype | None:
    return None if name == "keep" else getattr(torch, name)


def _shard_bytes(gigabytes: float) -> int:
    if not gigabytes > 0:
        raise UserError(f"--shard-gb {gigabytes} must be more than 0")
    return int(gigabytes * 10**9)


def _console() -> Console:
    return Console()


@contextmanager
def _bar(what: str, count: bool = False) -> Iterator[Bar]:
    numbers = (MofNCompleteColumn(),) if count else (DownloadColumn(), TransferSpeedColumn())
    columns = (TextColumn(what), BarColumn(), *numbers, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bar(progress, progress.add_task(what, total=None))
