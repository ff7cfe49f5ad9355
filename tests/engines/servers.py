"""Real servers from the environments that `make engines` builds, each ended with all that it started."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import httpx
import psutil
import pytest

from megatron_parallel_r1.rollout.launcher.command import (
    EngineName,
    LaunchSettings,
    build_command,
)
from megatron_parallel_r1.rollout.launcher.ports import pick_ports
from megatron_parallel_r1.rollout.launcher.run import server_url
from megatron_parallel_r1.rollout.launcher.supervisor import ServerProcess
from tests.unit.rollout.serving.launched import Launched, launched

ROOT = Path(__file__).resolve().parents[2]
# A server is ready in 25 to 60 s where it has a core for itself; here it may share one with other work.
START_SECONDS = 1200
CONTEXT_TOKENS = 1024


def python_of(engine: EngineName) -> Path:
    """The interpreter of an engine's environment; skips the test where it is not built."""
    environment = ROOT / f".venv-{engine}"
    if not (environment / "ready").exists():
        pytest.skip(f"no .venv-{engine}: make engines")
    return environment / "bin" / "python"


class Shared:
    """A server under `serve-rollout` that tests share, for a start is dear. It begins when a test first asks
    for it, and anew after a test has ended it."""

    def __init__(
        self,
        folder: Path,
        logs: Path,
        engine: EngineName = "sglang",
        isolated: bool = False,
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        settings = {"checkpoint": folder, "engine": engine, "isolated": isolated, "log_dir": logs}
        usual = {"python": python_of(engine), "port": 0, "device": "cpu", "context_tokens": CONTEXT_TOKENS}
        self.folder = folder
        self._settings, self._env = {**settings, **usual}, env
        self._stack = ExitStack()
        self._supervisor: Launched | None = None
        self._url = ""

    @property
    def supervisor(self) -> Launched:
        """Started if there is none; its server may be on the way back."""
        if self._supervisor is None or self._supervisor.process.poll() is not None:
            self.end()
            self._supervisor = self._stack.enter_context(launched(self._env, **self._settings))
            _, self._url, _ = self._supervisor.next_healthy(START_SECONDS)
        return self._supervisor

    @property
    def url(self) -> str:
        """Of the server, which answers."""
        end = time.monotonic() + START_SECONDS
        while self.supervisor.process.poll() is None and not _healthy(self._url):
            assert time.monotonic() < end, f"{self._url} is not healthy"
            time.sleep(0.5)
        return self._url

    @property
    def server(self) -> psutil.Process:
        (guard,) = psutil.Process(self.supervisor.process.pid).children()
        (server,) = guard.children()
        return server

    def end(self) -> None:
        """Tells it to end, if it runs, and sees that nothing is left."""
        self._stack.close()
        self._supervisor = None


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=20, verify=False).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def sglang(folder: Path, *options: str, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """The base URL of an SGLang server of a Hugging Face folder, as `parallel-r1 serve-rollout` starts it on
    a CPU; options and env win over the usual ones."""
    with _running(LaunchSettings(folder, engine="sglang", options=options), env or {}) as url:
        yield url


@contextmanager
def vllm(folder: Path, *options: str, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """As `sglang`, of a vLLM server."""
    with _running(LaunchSettings(folder, engine="vllm", options=options), env or {}) as url:
        yield url


@contextmanager
def _running(serving: LaunchSettings, env: Mapping[str, str]) -> Iterator[str]:
    serving = replace(serving, port=0, context_tokens=CONTEXT_TOKENS)
    python = python_of(serving.engine)
    (port,) = pick_ports(serving)
    command = build_command(serving, python, "cpu", port)
    command = replace(command, environment=command.environment | env)
    with TemporaryDirectory() as folder:
        child = ServerProcess(command, server_url(serving.host, port), Path(folder) / "server.log")
        child.start()
        try:
            wait_until_healthy(child)
            yield child.url
        finally:
            child.end()


def wait_until_healthy(child: ServerProcess) -> None:
    while child.status is None and child.age < START_SECONDS:
        if child.healthy():
            return
        time.sleep(0.5)
    state = "is not healthy in time" if child.status is None else f"ended with status {child.status}"
    log = "\n".join(child.last_lines(40))
    pytest.fail(f"the server {state}; its log ends:\n{log}", pytrace=False)
