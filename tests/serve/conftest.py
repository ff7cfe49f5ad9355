from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serve.release import write_release
from tests.serve.server import running


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def client(release: Path) -> Iterator[httpx.Client]:
    """Of a server with the default limits, but for a short wait for bodies."""
    with running(release, limits={"body_seconds": 1.0}) as client:
        yield client


@pytest.fixture(scope="session")
def narrow(release: Path) -> Iterator[httpx.Client]:
    """Of a server that serves one request at a time, lets two wait, for two seconds; with a key."""
    limits = {"running": 1, "waiting": 2, "seconds": 2.0, "prompt_tokens": 50, "max_tokens": 4000}
    with running(release, limits=limits, api_key="ключ") as client:
        client.headers = httpx.Headers({"Authorization": "Bearer ключ"}, encoding="utf-8")
        yield client
