"""Servers that tests share, for a start takes longer than most tests. Whoever shares one is in its group (an
`xdist_group`), which runs in one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.folders import tied_model, untied_model, write_folder, write_released
from tests.engines.isolated import STRICT
from tests.engines.servers import Shared

# The longest first; and what changes or ends shared servers behind what needs them as they are.
ORDER = (
    "test_rl",
    "test_isolated",
    "test_sglang",
    "test_release",
    "test_eval",
    "test_vllm",
    "test_losses",
    "test_serving",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem
        return ORDER.index(name) if name in ORDER else len(ORDER)

    ours = [item for item in items if item.path.parent.name == "engines"]
    items[:] = [*sorted(ours, key=place), *(item for item in items if item not in ours)]


@pytest.fixture(scope="session")
def sglang_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """A stock server of a release of `untied_model`."""
    folder = tmp_path_factory.mktemp("sglang")
    server = Shared(write_released(folder, untied_model()), folder / "logs")
    yield server
    server.end()


@pytest.fixture(scope="session")
def isolated_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Of the same model, with the plugin and room for all."""
    folder = tmp_path_factory.mktemp("isolated")
    written = write_folder(folder / "model", untied_model())
    server = Shared(written, folder / "logs", isolated=True, env=STRICT)
    yield server
    server.end()


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Of a release of `tied_model`."""
    folder = tmp_path_factory.mktemp("vllm")
    server = Shared(write_released(folder, tied_model()), folder / "logs", "vllm")
    yield server
    server.end()
