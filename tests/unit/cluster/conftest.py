from __future__ import annotations

import subprocess

import pytest


@pytest.fixture(scope="session", autouse=True)
def bash_4() -> None:
    """What the scripts of slurm/ are written for."""
    version = subprocess.run(
        ["bash", "-c", "echo $BASH_VERSINFO"], capture_output=True, text=True, check=True
    )
    if int(version.stdout) < 4:
        pytest.skip(f"bash is {version.stdout.strip()} here, and slurm/*.sh need 4: macOS has an old one")
