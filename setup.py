"""Puts recipes/ into the wheel as megatron_parallel_r1/recipes; everything else is in setup.cfg."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    def run(self) -> None:
        super().run()
        if not getattr(self, "editable_mode", False):
            folder = Path(self.build_lib) / "megatron_parallel_r1" / "recipes"
            scripts = shutil.ignore_patterns("*.py", "__pycache__")
            shutil.copytree("recipes", folder, ignore=scripts, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
