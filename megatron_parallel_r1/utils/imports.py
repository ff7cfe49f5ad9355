"""Makes the import of torch and Megatron-Core quiet and, on a machine without a GPU, light.

Only known messages are dropped: they are true, and of no use to someone who runs on CPUs on purpose.

Megatron-Core compiles its fusions at import, which loads torch.compile's machinery, and imports W&B, whose
settings are large pydantic models: together 40 % of the CPU time until a training process has its modules. We
switch its fusions off on CPUs (model/transformer.py) and log to W&B ourselves (run/wandb_log.py).
"""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

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


def prepare_imports() -> None:
    """Call it before torch is imported. Python's -W and PYTHONWARNINGS override the filters of warnings."""
    if "megatron.core" not in sys.modules and not any(isinstance(f, _LightMegatron) for f in sys.meta_path):
        sys.meta_path.insert(0, _LightMegatron())
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


class _LightMegatron(MetaPathFinder):
    """Imports `megatron.core` without what we do not use of it; steps aside for every other module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "megatron.core":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(_import_lightly, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _import_lightly(import_core: Callable[[ModuleType], None], module: ModuleType) -> None:
    import torch

    with _hidden("wandb"):
        if torch.cuda.is_available():
            import_core(module)
            return
        compile_function = torch.compile
        torch.compile = _not_compiled  # type: ignore[assignment]
        try:
            import_core(module)
        finally:
            torch.compile = compile_function
    from megatron.core.jit import disable_jit_fuser

    disable_jit_fuser()  # for the modules that follow


def _not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Stands in for the decorator `torch.compile`."""
    return function


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Makes the import of a module fail that is not loaded yet, as if it were not installed."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
