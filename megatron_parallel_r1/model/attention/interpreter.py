"""Whether Triton's kernels run in its interpreter: on the CPU, step by step, as their tests have it."""

from __future__ import annotations

import os


def interpreted() -> bool:
    """Triton itself reads the variable once, when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"
