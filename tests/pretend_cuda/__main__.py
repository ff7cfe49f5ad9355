"""Runs a module as a program under pretend CUDA and saves the ledger of each rank.

python -m tests.pretend_cuda FOLDER MODULE ARGUMENTS...
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from tests.pretend_cuda.device_guard import load_guard
from tests.pretend_cuda.ledger import LEDGER


def main() -> None:
    folder, module, *arguments = sys.argv[1:]
    load_guard()
    from tests.pretend_cuda.runtime import install  # imports torch

    install()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        LEDGER.save(Path(folder) / f"ledger.{os.environ.get('RANK', '0')}.json")


if __name__ == "__main__":
    main()
