from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.folders import write_folder
from tests.engines.servers import sglang, vllm


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny random Qwen3 in float32 with tied embeddings."""
    return write_folder(tmp_path_factory.mktemp("engines") / "tiny")


@pytest.fixture(scope="session")
def sglang_url(tiny_folder: Path) -> Iterator[str]:
    """Of a server that tests share: they leave its weights as they are."""
    with sglang(tiny_folder) as url:
        yield url


@pytest.fixture(scope="session")
def vllm_url(tiny_folder: Path) -> Iterator[str]:
    """Of a server that tests share: they leave its weights as they are."""
    with vllm(tiny_folder) as url:
        yield url
