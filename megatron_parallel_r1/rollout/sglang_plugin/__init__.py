"""Exact path isolation in a stock SGLang server: a plugin of its group `sglang.srt.plugins`.

A request names the closed blocks of its prompt (rollout/joined_blocks.py). It then attends to the keys and
values that the paths wrote, at the positions they were written at, and continues after the longest path:

- contexts.py   what a token sees, as chains of SGLang's prefix cache
- requests.py   reads and checks a request's blocks; internal requests that write missing cache
- cache.py      matches, locks and stores such a request's cache
- admission.py  writes what a join needs and the cache lacks, before admitting the join
- positions.py  rotary positions
- hooks.py      settings refused at start, every hook into SGLang, and the report to clients

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
    """Called by SGLang in each of its processes, before the engine is created.

    Does nothing unless `SGLANG_PLUGINS` names the plugin: installing the package changes no server.
    SGLang only logs an exception here and starts without the plugin, so a refusal ends the process.

    Raises:
        SystemExit: the plugin is not tested with this release of SGLang.
    """
    if NAME not in [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")]:
        return
    require_tested(os.environ)
    from megatron_parallel_r1.rollout.sglang_plugin.hooks import register_hooks

    register_hooks()


def require_tested(env: Mapping[str, str]) -> None:
    """Refuses a release of SGLang that the hooks were not tested with.

    Raises:
        SystemExit: it is untested, and `env` does not set PARALLEL_R1_ANY_SGLANG=1.
    """
    release = version("sglang")
    if release not in TESTED and env.get(ANY_VERSION) != "1":
        raise SystemExit(
            f"parallel_r1: tested with SGLang {', '.join(TESTED)}, this is {release}: install a tested one, "
            f"or set {ANY_VERSION}=1 and check log-probs against the trainer's"
        )
