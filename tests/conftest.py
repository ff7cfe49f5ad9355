from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Machines are busy at times; what hangs is ended by other means.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _signal_mask() -> Iterator[None]:
    """Restores the mask that children inherit; a command blocks stop signals for its process's life."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with copies of published data sets; tests that need it skip where it is absent."""
    repository = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("MPR1_SHARED") or repository.parent / "shared") / "data"
    if not folder.is_dir():
        pytest.skip("no real data: set MPR1_SHARED to the folder that holds data/")
    return folder
