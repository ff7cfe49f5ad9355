"""Exact path isolation in a stock SGLang server: a plugin of its group `sglang.srt.plugins`.

A request names the closed blocks of its prompt (rollout/joined_blocks.py). The plugin has it attend to the
keys and values that the paths wrote, each where it was written, and go on behind the longest one:

- contexts.py   what a token sees, as chains of SGLang's prefix cache
- request.py    a request's blocks, read and checked
- cache.py      matching, locking and keeping such a request's cache
- admission.py  writes what a join needs and the cache lacks, before the join is let in
- writers.py    the internal requests that do so
- positions.py  rotary positions
- limits.py     what is refused at start      versions.py  releases that it is tested with
- handshake.py  what a client is told         hooks.py     where all this takes hold of SGLang

Importing this package loads neither torch nor SGLang.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version

NAME = "parallel_r1"
TESTED = ("0.5.23",)
ANY_VERSION = "PARALLEL_R1_ANY_SGLANG"


def register() -> None:
    """What SGLang calls in each of its processes, before the engine is made.

    Does nothing unless `SGLANG_PLUGINS` names the plugin: installing the package changes no server.
    SGLang only logs an exception here and starts without the plugin, so what is refused ends the process.

    Raises:
        SystemExit: this release of SGLang is not one that the plugin is tested with.
    """
    if NAME not in [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")]:
        return
    require_tested(os.environ)
    from megatron_parallel_r1.rollout.sglang_plugin.hooks import register_hooks

    register_hooks()


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
