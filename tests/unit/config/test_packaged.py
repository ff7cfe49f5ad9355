"""The wheel holds the recipes, and a recipe is found there by its name outside a checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_parallel_r1.config.reader import read_recipe

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout, with what is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("megatron_parallel_r1", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    done = subprocess.run([sys.executable, *build, str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_every_recipe_is_inside_and_is_found_by_name(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    installed = tmp_path / "site/megatron_parallel_r1/recipes"
    assert {path.relative_to(installed) for path in installed.rglob("*.yaml")} == {
        path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.yaml")
    }
    program = (
        "from pathlib import Path; from megatron_parallel_r1.config import reader; "
        "print(reader.__file__, reader.read_recipe(Path('tiny/demo')).name, "
        "reader.read_recipe(Path('qwen3_4b/rl_s1')).name)"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    file, *names = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path) and names == ["tiny", "qwen3_4b"]


def test_a_file_goes_before_a_packaged_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_recipe(Path("tiny/demo")) == read_recipe(ROOT / "recipes/tiny/demo.yaml")
    own = tmp_path / "tiny/demo"
    own.parent.mkdir()
    own.write_text((ROOT / "recipes/tiny/demo.yaml").read_text().replace("name: tiny", "name: own"))
    assert read_recipe(Path("tiny/demo")).name == "own"
