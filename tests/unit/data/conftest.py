from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the copies that `datasets` makes of local files out of the user's cache."""
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real data sets; tests that need it skip where it is absent."""
    repository = Path(__file__).resolve().parents[3]
    folder = Path(os.environ.get("MPR1_SHARED") or repository.parent / "shared") / "data"
    if not folder.is_dir():
        pytest.skip("no real data: set MPR1_SHARED to the folder that holds data/")
    return folder
