"""A file system that takes no direct reads or writes, as some do not."""

from __future__ import annotations

import errno
import os

import pytest

from megatron_parallel_r1.checkpoint_formats.direct_io import DIRECT, is_direct

needs_direct = pytest.mark.skipif(not DIRECT, reason="this system has no direct reads and writes")


def refuse_direct(monkeypatch: pytest.MonkeyPatch, call: str) -> list[object]:
    """Has `os.open`, or only the reads or writes behind it, refuse; returns a list of what was refused."""
    real, refused = getattr(os, call), []

    def refuse(target: object, *rest: object) -> int:
        if rest[0] & DIRECT if call == "open" else is_direct(target):
            refused.append(target)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(target, *rest)

    monkeypatch.setattr(os, call, refuse)
    return refused
