"""Hugging Face folders: config.json, safetensors and a tokenizer, as every inference engine reads them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_hf_folder(path: Path | str) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """The architecture and, read one by one as they are asked for, the weights of a folder.

    Raises:
        UserError: a file is missing or damaged, or the architecture is not supported.
    """
    folder = Path(path)
    try:
        config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no config.json; give the folder of a Hugging Face model on this machine"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder}/config.json is no valid JSON ({error}); copy it again") from None
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    return config, _read(_weight_files(folder))


def hf_sizes(path: Path | str) -> dict[str, tuple[int, ...]]:
    """Names and sizes of a folder's weights, without reading them.

    Raises:
        UserError: as `load_hf_folder`.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(Path(path)):
        try:
            with safe_open(file, framework="pt") as tensors:
                sizes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({error}); copy it again") from None
    return sizes


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder}: no *.safetensors files; convert the model with transformers' save_pretrained"
        )
    return files


def _read(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({error}); copy it again") from None


def save_hf_folder(
    path: Path | str,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Writes a folder that AutoModelForCausalLM, SGLang and vLLM load; a reader never sees half of it.

    Args:
        path: a new folder, or an earlier model, which is replaced.
        config: the architecture.
        tensors: Hugging Face names and tensors of one dtype.
        tokenizer: saved beside the model if given; its eos ends generation.
        extra: further files, name and text.

    Raises:
        UserError: the path holds something that is no model.
    """
    folder = Path(path)
    if folder.is_file() or (
        folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists()
    ):
        raise UserError(f"{folder} exists and is no Hugging Face model; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(work / "new", config, tensors, tokenizer)
        for name, text in (extra or {}).items():
            (work / "new" / name).write_text(text)
        if folder.exists():
            folder.rename(work / "old")
        (work / "new").rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(
    folder: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    folder.mkdir()
    weights = {name: tensor.contiguous().cpu() for name, tensor in tensors}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = config.to_hf(next(iter(weights.values())).dtype)
    generation: dict[str, object] = {"do_sample": True}
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        stops = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        settings |= stops
        generation |= stops
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
