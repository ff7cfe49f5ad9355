"""What the container's Pythons, which have none of the package's code, find of it in the mount."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
DOCKERFILE = REPOSITORY / "slurm/container/Dockerfile"
STEP = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}
# Finds plugins as SGLang does; says from which file each one's code comes.
SERVER = """
import sys
from importlib.metadata import entry_points
for one in entry_points(group="sglang.srt.plugins"):
    print(one.name, sys.modules[one.load().__module__].__file__)
"""


def python_with(folder: Path, *packages: Path) -> Path:
    """A Python that sees what this one has installed, but for the package itself, and `packages`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (own,) = folder.glob("lib/python*/site-packages")
    all_here = Path(sysconfig.get_path("purelib")).iterdir()
    for package in (*(one for one in all_here if "megatron_parallel" not in one.name), *packages):
        (own / package.name).symlink_to(package)
    return folder / "bin/python"


def mounted(folder: Path) -> Path:
    """The repository as a fresh clone has it: what an install leaves beside the code is not there."""
    for part in ("megatron_parallel_r1", "slurm", "eval"):
        shutil.copytree(
            REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    return folder


def run(repository: Path, *words: str | Path) -> str:
    own = {**os.environ, **STEP, "URLS": "urls"}
    done = subprocess.run(["bash", *words], cwd=repository, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_evaluation_finds_the_package(tmp_path: Path) -> None:
    python, repository = python_with(tmp_path / "python"), mounted(tmp_path / "mounted")
    assert "--checkpoint" in run(repository, "slurm/rank.sh", python, "eval/run.py", "--help")


def test_an_engine_finds_the_plugins_and_takes_their_code_from_the_mount(tmp_path: Path) -> None:
    """What the image installs for SGLang is installed here from the files that its build has."""
    told, image = DOCKERFILE.read_text(), tmp_path / "image"
    for sources, target in re.findall(r"^COPY (.+) (\S+)$", told, re.M):
        (image / target).mkdir(parents=True, exist_ok=True)
        for source in sources.split():
            shutil.copy(REPOSITORY / source, image / target)
    (words,) = re.findall(r"^RUN /opt/sglang/bin/pip (install --no-deps .+)$", told, re.M)
    offline = ("--no-build-isolation", "--quiet", "--disable-pip-version-check", "--target", "../packages")
    subprocess.run([sys.executable, "-m", "pip", *words.split(), *offline], cwd=image, check=True)
    (tmp_path / "packages/server.py").write_text(SERVER)
    python = python_with(tmp_path / "python", *(tmp_path / "packages").iterdir())
    repository = mounted(tmp_path / "mounted")
    plugins = run(repository, "slurm/server.sh", python, "-m", "server").split()
    code = repository / "megatron_parallel_r1/rollout"
    assert plugins == [
        *("parallel_r1", f"{code}/sglang_plugin/__init__.py"),
        *("parallel_r1_seeds", f"{code}/sglang_seeds.py"),
    ]
