"""The manifest of a checkpoint: its files and their digests, so that damage is found and named.

step_000040/manifest.json      the step, the loop's state, the score; size and SHA-256 of every other file
            manifest.sha256    of manifest.json, as `sha256sum -c` reads it
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_parallel_r1.utils.files import FileDigest, file_digest, fsync_path

MANIFEST, SEAL = "manifest.json", "manifest.sha256"


class Damaged(Exception):
    """A checkpoint differs from what was written; the message names the file and the fault."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of `manifest.json`.

    Attributes:
        step: the loop's last finished step.
        optimizer_steps: steps that Adam has made.
        score: ranks checkpoints for `keep_best`; None without one.
        state: the loop's state, JSON.
        files: digests of all files except the manifest's own two.
    """

    step: int
    optimizer_steps: int
    score: float | None
    state: dict[str, Any]
    files: dict[str, FileDigest]


def file_fault(file: Path, expected: FileDigest) -> str | None:
    """Compares a file with its digest; describes the fault, None if it has none."""
    try:
        size = file.stat().st_size
        if size != expected.size:
            return f"{file.name} is {size} bytes instead of {expected.size}"
        if file_digest(file) != expected:
            return f"{file.name} has other bytes than were written"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Completes a checkpoint; its files and their names are on disk when this returns."""
    text = json.dumps(asdict(manifest), indent=1).encode()
    for name, content in ((MANIFEST, text), (SEAL, _seal(text))):
        (folder / name).write_bytes(content)
        fsync_path(folder / name)
    fsync_path(folder)


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a checkpoint and verifies its digest.

    Raises:
        Damaged: it is missing, or differs from what was written.
    """
    try:
        text, seal = ((folder / name).read_bytes() for name in (MANIFEST, SEAL))
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except OSError as error:
        raise Damaged(f"{Path(error.filename).name} cannot be read ({error.strerror})") from None
    if seal != _seal(text):
        raise Damaged(f"{MANIFEST} and its digest in {SEAL} do not agree")
    written = json.loads(text)
    return Manifest(**written | {"files": {name: FileDigest(**f) for name, f in written["files"].items()}})


def _seal(text: bytes) -> bytes:
    return f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()
