"""The container's Pythons, which lack this package, find its code in the mounted repository."""

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
# Finds plugins as SGLang does; prints the file that each is loaded from.
SERVER = """
import sys
from importlib.metadata import entry_points
for plugin in entry_points(group="sglang.srt.plugins"):
    print(plugin.name, sys.modules[plugin.load().__module__].__file__)
"""


def python_with(folder: Path, *packages: Path) -> Path:
    """A virtual environment with this one's packages except our own, plus `packages`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (target,) = folder.glob("lib/python*/site-packages")
    installed = Path(sysconfig.get_path("purelib")).iterdir()
    for package in (*(path for path in installed if "megatron_parallel" not in path.name), *packages):
        (target / package.name).symlink_to(package)
    return folder / "bin/python"


def mounted(folder: Path) -> Path:
    """A copy of the repository as in a fresh clone, without the traces of an install."""
    for part in ("megatron_parallel_r1", "slurm", "eval"):
        shutil.copytree(
            REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    return folder


def run(repository: Path, *command: str | Path) -> str:
    environment = {**os.environ, **STEP, "URLS": "urls"}
    done = subprocess.run(["bash", *command], cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_evaluation_finds_the_package(tmp_path: Path) -> None:
    python, repository = python_with(tmp_path / "python"), mounted(tmp_path / "mounted")
    assert "--checkpoint" in run(repository, "slurm/rank.sh", python, "eval/run.py", "--help")


def test_an_engine_finds_the_plugins_and_takes_their_code_from_the_mount(tmp_path: Path) -> None:
    """Installs for SGLang what the image installs, from the files that its build copies."""
    dockerfile, image = DOCKERFILE.read_text(), tmp_path / "image"
    for sources, target in re.findall(r"^COPY (.+) (\S+)$", dockerfile, re.M):
        (image / target).mkdir(parents=True, exist_ok=True)
        for source in sources.split():
            shutil.copy(REPOSITORY / source, image / target)
    (arguments,) = re.findall(r"^RUN /opt/sglang/bin/pip (install --no-deps .+)$", dockerfile, re.M)
    offline = ("--no-build-isolation", "--quiet", "--disable-pip-version-check", "--target", "../packages")
    subprocess.run([sys.executable, "-m", "pip", *arguments.split(), *offline], cwd=image, check=True)
    (tmp_path / "packages/server.py").write_text(SERVER)
    python = python_with(tmp_path / "python", *(tmp_path / "packages").iterdir())
    repository = mounted(tmp_path / "mounted")
    plugins = run(repository, "slurm/server.sh", python, "-m", "server").split()
    code = repository / "megatron_parallel_r1/rollout"
    assert plugins == [
        *("parallel_r1", f"{code}/sglang_plugin/__init__.py"),
        *("parallel_r1_cpu", f"{code}/sglang_cpu.py"),
    ]
