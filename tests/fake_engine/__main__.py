"""Runs a module as a program over the fake library.

TRANSFORMER_ENGINE_SOURCE=$(.ci/transformer_engine) python -m tests.fake_engine MODULE ARGUMENTS...
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from megatron_parallel_r1.utils.imports import prepare_imports


def main() -> None:
    prepare_imports()
    from tests.fake_engine.extension import install  # imports torch

    install(Path(os.environ["TRANSFORMER_ENGINE_SOURCE"]))
    _, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
