"""The releases of SGLang that the hooks are tested with."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

TESTED = ("0.5.23",)
ANY_VERSION = "PARALLEL_R1_ANY_SGLANG"


def require_tested(env: Mapping[str, str]) -> None:
    """Refuses an SGLang that the hooks were not tested with.

    Raises:
        SystemExit: so it is, and `env` does not set PARALLEL_R1_ANY_SGLANG=1.
    """
    found = version("sglang")
    if found not in TESTED and env.get(ANY_VERSION) != "1":
        raise SystemExit(
            f"parallel_r1: tested with SGLang {', '.join(TESTED)}, this is {found}: install a tested one, or "
            f"set {ANY_VERSION}=1 and check log-probs against the trainer's"
        )
