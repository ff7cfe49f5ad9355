"""Compiles and loads the device guard that makes torch accept tensors of a CUDA device.

torch looks for its CUDA hooks once, at import, so this module does not import it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_parallel_r1"


def missing() -> str | None:
    """What this machine lacks for pretend CUDA, for a skip; None if nothing."""
    if "+cpu" not in version("torch"):
        return "pretend CUDA needs a CPU build of torch: a CUDA build registers its own device guard"
    if not shutil.which("c++") and not shutil.which("g++"):
        return "pretend CUDA needs a C++ compiler (g++)"
    return None


def load_guard() -> None:
    """Loads the guard before torch is imported; compiles it once for each torch, which takes about 10 s."""
    assert "torch" not in sys.modules, "torch has already looked for its CUDA hooks"
    # The library names the folder of the torch that it belongs to.
    torch = f"{version('torch')} {_torch_home()}"
    key = hashlib.sha256(SOURCE.read_bytes() + torch.encode()).hexdigest()[:16]
    library = CACHE / f"pretend-cuda-{key}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            built = Path(folder) / library.name
            _compile(built)
            built.replace(library)  # atomic: processes that start together compile twice and agree
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _torch_home() -> Path:
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).resolve().parent


def _compile(out: Path) -> None:
    home = _torch_home()
    folders = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}", f"-L{home / 'lib'}"]
    compiler = shutil.which("c++") or "g++"
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", f"-Wl,-rpath,{home / 'lib'}"]
    command = [compiler, *flags, str(SOURCE), "-o", str(out), *folders, "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"guard.cpp does not compile against torch {version('torch')}:\n{done.stderr}")
