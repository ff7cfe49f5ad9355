"""What a complete checkpoint consists of, so that damage to it is found and named.

step_000040/manifest.json      the step, the loop's state, the score; size and SHA-256 of every other file
            manifest.sha256    of manifest.json, as `sha256sum -c` reads it
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_parallel_r1.utils.files import fsync_path

MANIFEST, SEAL = "manifest.json", "manifest.sha256"
CHUNK = 2**22  # bytes read at a time


class Damaged(Exception):
    """A checkpoint is not what was written; the message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """By which a file is known: its size in bytes, and its SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """
    Attributes:
        step: of the loop, after which it was made.
        optimizer_steps: that Adam had taken.
        score: by which the best is kept, None if it was not evaluated.
        state: the loop's own, JSON.
        files: stamps of all files but the manifest's own two.
    """

    step: int
    optimizer_steps: int
    score: float | None
    state: dict[str, Any]
    files: dict[str, Stamp]


def stamp(file: Path) -> Stamp:
    """Of a file as it is now."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return Stamp(size, digest.hexdigest())


def fault(file: Path, expected: Stamp) -> str | None:
    """What is wrong with a file, None if nothing."""
    try:
        size = file.stat().st_size
        if size != expected.size:
            return f"{file.name} is {size} bytes instead of {expected.size}"
        if stamp(file) != expected:
            return f"{file.name} has other bytes than were written"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Completes a checkpoint; its files and their names are on the disk when this returns."""
    text = json.dumps(asdict(manifest), indent=1).encode()
    for name, content in ((MANIFEST, text), (SEAL, _seal(text))):
        (folder / name).write_bytes(content)
        fsync_path(folder / name)
    fsync_path(folder)


def read_manifest(folder: Path) -> Manifest:
    """
    Raises:
        Damaged: there is none, or it is not as it was written.
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
    return Manifest(**written | {"files": {name: Stamp(**f) for name, f in written["files"].items()}})


def _seal(text: bytes) -> bytes:
    return f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()
