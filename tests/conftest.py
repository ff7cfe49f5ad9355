from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Machines are busy at times; what hangs is ended by other means.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with copies of published data sets; tests that need it skip where it is absent."""
    repository = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("MPR1_SHARED") or repository.parent / "shared") / "data"
    if not folder.is_dir():
        pytest.skip("no real data: set MPR1_SHARED to the folder that holds data/")
    return folder
