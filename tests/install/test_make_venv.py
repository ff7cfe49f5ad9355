"""What `make` says where it cannot install: one line, exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def make_venv(folder: Path, **settings: str | Path) -> str:
    """What make-venv says as it ends with exit code 2, with no package index to be reached."""
    nowhere = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment = {**kept, **nowhere, "PYTHON": sys.executable, **settings}
    done = subprocess.run(
        [ROOT / "make-venv", folder], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done
    return done.stderr


def script(file: Path, text: str) -> Path:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def test_no_such_python(tmp_path: Path) -> None:
    assert make_venv(tmp_path / "venv", PYTHON="python3.99") == (
        "error: PYTHON=python3.99: no such Python; make PYTHON=python3.10 or newer\n"
    )


def test_python_too_old(tmp_path: Path) -> None:
    old = script(tmp_path / "python", "echo 3.9.18")
    assert make_venv(tmp_path / "venv", PYTHON=old) == (
        f"error: PYTHON={old} is 3.9.18 and this package takes >= 3.10; make PYTHON=python3.10 or newer\n"
    )


def test_python_too_new_for_torch(tmp_path: Path) -> None:
    message = "ERROR: No matching distribution found for torch==2.13.0"
    new = script(
        tmp_path / "python",
        f"""case "$*" in
            *version_info*) echo 3.99.0;;
            *ensurepip*) ;;
            *venv*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python";;
            *) echo "{message}" >&2; exit 1;;
        esac""",
    )
    assert make_venv(tmp_path / "venv", PYTHON=new) == (
        f"error: PYTHON={new} is 3.99.0 and there is no torch==2.13.0 for it here; make PYTHON= another one\n"
    )


def test_python_without_venv(tmp_path: Path) -> None:
    bare = script(tmp_path / "python", f'case "$*" in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"')
    output = make_venv(tmp_path / "venv", PYTHON=bare)
    assert output.startswith(f"error: PYTHON={bare} has no module venv; install it (Debian, Ubuntu: apt ")
    assert output.count("\n") == 1


@pytest.mark.parametrize("was_ready", [pytest.param(False, marks=pytest.mark.slow), True])
def test_no_network(tmp_path: Path, was_ready: bool) -> None:
    """An interrupted install is begun anew; one that was whole is kept, to be brought up to date later."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    left = folder / "left"
    left.touch()
    if was_ready:
        (folder / "ready").touch()
    assert make_venv(folder).startswith("error: no network: pip cannot reach its package index")
    assert left.exists() == (folder / "ready").exists() == was_ready


def test_what_is_ready_starts_at_once(tmp_path: Path) -> None:
    (tmp_path / "ready").touch()
    done = subprocess.run(
        ["make", "-n", "test", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "pytest" in done and "make-venv" not in done
