"""Keeps off the terminal what torch and Megatron-Core print at import on a machine without a GPU.

Only known messages are dropped: they are true, and of no use to someone who runs on CPUs on purpose.
"""

from __future__ import annotations

import logging
import sys
import warnings

# Logger, and how its message begins.
LOGGED = {
    # A CUDA build of torch without a driver where nvcc is installed; Megatron-Core imports the module.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    # On macOS, about torchrun's log files.
    "torch.distributed.elastic.multiprocessing.redirects": "NOTE: Redirects are currently not supported",
}
# Category, and what its message matches; the module that warns differs by version.
WARNED = (
    # A CUDA build of torch that finds no driver, or one that is too old.
    (UserWarning, "CUDA initialization: "),
    (UserWarning, "Can't initialize NVML"),
)


def quiet_imports() -> None:
    """Installs the filters; call it before torch is imported. Python's -W and PYTHONWARNINGS override it."""
    for name, start in LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _DropMessage) for known in logger.filters):
            logger.addFilter(_DropMessage(start))
    if sys.warnoptions:
        return
    # Megatron-Core warns that Apex and Transformer Engine are missing, which no CPU has.
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    for category, message in WARNED:
        warnings.filterwarnings("ignore", message, category)


class _DropMessage(logging.Filter):
    """Drops records whose message begins with a text."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._start)
