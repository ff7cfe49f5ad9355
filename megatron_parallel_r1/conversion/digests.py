"""Whether the files of a folder are those that were written."""

from __future__ import annotations

from pathlib import Path

from megatron_parallel_r1.checkpoint_formats.torch_dist import find_checkpoint
from megatron_parallel_r1.conversion.to_megatron import Advance
from megatron_parallel_r1.conversion.work_folder import SUMS
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.train.checkpoints.manifest import MANIFEST, Damaged, fault, read_manifest, stamp


def bytes_to_check(path: Path) -> int:
    """How many `check_digests` will read at most."""
    folder = path if (path / SUMS).is_file() else find_checkpoint(path) or path
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_digests(path: Path, advance: Advance = lambda count: None) -> list[str]:
    """What is wrong with the files of a folder that was converted, released, or saved by a run.

    Args:
        advance: is told bytes as files are read.

    Raises:
        UserError: nothing was written down about them.
    """
    if (path / SUMS).is_file():
        return _by_sums(path, advance)
    checkpoint = find_checkpoint(path)
    if checkpoint is not None and (checkpoint / MANIFEST).is_file():
        return _by_manifest(checkpoint, advance)
    raise UserError(f"{path}: neither {SUMS} nor {MANIFEST} is in it; there is nothing to check against")


def _by_manifest(checkpoint: Path, advance: Advance) -> list[str]:
    try:
        manifest = read_manifest(checkpoint)
    except Damaged as damage:
        return [str(damage)]
    wrong = []
    for name, expected in sorted(manifest.files.items()):
        if why := fault(checkpoint / name, expected):
            wrong.append(why)
        advance(expected.size)
    return wrong


def _by_sums(path: Path, advance: Advance) -> list[str]:
    wrong = []
    for line in (path / SUMS).read_text().splitlines():
        digest, _, name = line.partition("  ")
        file = path / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
            continue
        if stamp(file).sha256 != digest:
            wrong.append(f"{name} has other bytes than were written")
        advance(file.stat().st_size)
    return wrong
