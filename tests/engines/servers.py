"""Real servers from the environments that `make engines` builds, each ended with all that it started."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from megatron_parallel_r1.rollout.serving.child import Child
from megatron_parallel_r1.rollout.serving.commands import Command, command_of
from megatron_parallel_r1.rollout.serving.places import ports_of, url_of
from megatron_parallel_r1.rollout.serving.settings import EngineName, Serving

ROOT = Path(__file__).resolve().parents[2]
# A server is ready in 25 to 60 s where it has a core for itself; here it may share one with other work.
START_SECONDS = 600


def python_of(engine: EngineName) -> Path:
    """The interpreter of an engine's environment; skips the test where it is not built."""
    made = ROOT / f".venv-{engine}"
    if not (made / "ready").exists():
        pytest.skip(f"no .venv-{engine}: make engines")
    return made / "bin" / "python"


@contextmanager
def sglang(folder: Path, *options: str, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """The base URL of an SGLang server of a Hugging Face folder, as `parallel-r1 serve-rollout` starts it on
    a CPU; options and env win over the usual ones."""
    with _running(Serving(folder, engine="sglang", options=options), env or {}) as url:
        yield url


@contextmanager
def vllm(folder: Path, *options: str, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """As `sglang`, of a vLLM server."""
    with _running(Serving(folder, engine="vllm", options=options), env or {}) as url:
        yield url


@contextmanager
def _running(serving: Serving, env: Mapping[str, str]) -> Iterator[str]:
    serving = replace(serving, port=0, context_tokens=1024)
    python = python_of(serving.engine)
    (port,) = ports_of(serving)
    command = command_of(serving, python, "cpu", port)
    command = Command(command.arguments, command.environment | env)
    with TemporaryDirectory() as folder:
        child = Child(command, url_of(serving.host, port), Path(folder) / "server.log")
        child.start()
        try:
            _wait_until_healthy(child)
            yield child.url
        finally:
            child.end()


def _wait_until_healthy(child: Child) -> None:
    while child.status is None and child.age < START_SECONDS:
        if child.healthy():
            return
        time.sleep(0.5)
    state = "is not healthy in time" if child.status is None else f"ended with status {child.status}"
    log = "\n".join(child.last_lines(40))
    pytest.fail(f"the server {state}; its log ends:\n{log}", pytrace=False)
