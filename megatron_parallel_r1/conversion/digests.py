"""Whether the files of a folder are those that were written."""

from __future__ import annotations

from pathlib import Path

from megatron_parallel_r1.conversion.to_megatron import Advance
from megatron_parallel_r1.conversion.work import SUMS
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.torch_dist import find_checkpoint
from megatron_parallel_r1.train.checkpoints.manifest import MANIFEST, Damaged, fault, read_manifest, stamp


def check_digests(path: Path, advance: Advance = lambda count: None) -> list[str]:
    """What is wrong with the files of a folder that was converted, released, or saved by a run.

    Raises:
        UserError: nothing was written down about them.
    """
    if (path / SUMS).is_file():
        return _by_sums(path, advance)
    checkpoint = find_checkpoint(path)
    if checkpoint is not None and (checkpoint / MANIFEST).is_file():
        try:
            manifest = read_manifest(checkpoint)
        except Damaged as damage:
            return [str(damage)]
        faults = (fault(checkpoint / name, expected) for name, expected in sorted(manifest.files.items()))
        return [why for why in faults if why]
    raise UserError(f"{path}: neither {SUMS} nor {MANIFEST} is in it; there is nothing to check against")


def _by_sums(path: Path, advance: Advance) -> list[str]:
    wrong = []
    for line in (path / SUMS).read_text().splitlines():
        digest, _, name = line.partition("  ")
        file = path / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif stamp(file).sha256 != digest:
            wrong.append(f"{name} has other bytes than were written")
        else:
            advance(file.stat().st_size)
    return wrong
