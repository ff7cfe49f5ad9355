"""Hugging Face folders: config.json, safetensors and a tokenizer, the form that inference engines read.

Wherever weights are read, a distributed checkpoint of Megatron with a config.json works too.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_parallel_r1.architecture.families import EMBEDDING, HEAD
from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import check_fit
from megatron_parallel_r1.checkpoint_formats.companions import generation_of, legal_files
from megatron_parallel_r1.checkpoint_formats.safetensors_file import (
    StoredTensor,
    equal_tensors,
    save_tensors,
    stored_tensors,
)
from megatron_parallel_r1.checkpoint_formats.torch_dist import (
    MegatronCheckpoint,
    find_checkpoint,
    read_weights,
)
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.tokenizer import GENERATION, save_tokenizer
from megatron_parallel_r1.utils.hub import missing_folder

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_hf_folder(path: Path | str) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """Returns a folder's config and an iterator that reads its weights one by one.

    The weights may also be a distributed checkpoint of Megatron; they have their Hugging Face names.

    Raises:
        UserError: a file is missing or damaged, the architecture is not supported, or weights do not fit it.
    """
    config = read_config(path)
    folder = Path(path)
    if not any(folder.glob("*.safetensors")) and find_checkpoint(folder) is not None:
        checkpoint = MegatronCheckpoint(folder)
        checkpoint.check(config)
        return config, read_weights(checkpoint, config)
    stored_weights(folder, config)
    return config, _read(weight_files(folder))


def read_config(path: Path | str) -> ModelConfig:
    """Reads the config.json of a folder.

    Raises:
        UserError: as `load_hf_folder`.
    """
    folder = Path(path)
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise UserError("config.json is not a JSON object; copy it again")
        return ModelConfig.from_hf(fields)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no config.json; {missing_folder(folder)}") from None
    except OSError as error:
        raise UserError(f"{folder}/config.json: {error.strerror}; make it readable") from None
    except ValueError as error:  # also for invalid UTF-8
        raise UserError(f"{folder}/config.json is not valid JSON ({error}); copy it again") from None
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def stored_weights(folder: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Returns a folder's safetensors by name, without reading them.

    Raises:
        UserError: they do not fit the config, or a tied model has a head that is not its embedding:
            transformers 5 keeps such a head, transformers 4 and inference engines do not.
    """
    stored = stored_tensors(weight_files(folder))
    check_fit(config, {name: tensor.shape for name, tensor in stored.items()})
    (embedding, _), (head, _) = EMBEDDING.hf[0], HEAD.hf[0]
    if config.tied and head in stored and not equal_tensors(stored[head], stored[embedding]):
        raise UserError(
            f"{folder}: config.json says tie_word_embeddings, but {head} differs from {embedding}; set "
            f"tie_word_embeddings to false to use that head, or delete {head}"
        )
    return stored


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that transformers loads: model.safetensors, or else those in the index.

    Raises:
        UserError: there are none, or one in the index is missing.
    """
    single, index = folder / shard_names(1)[0], folder / INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [folder / name for name in named]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} is damaged ({error}); copy it again") from None
        for file in files:
            if not file.is_file():
                raise UserError(f"{folder}: {file.name}, which {INDEX} names, is missing; copy it again")
        return files
    if others := sorted(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder}: {others[0].name} is there, but neither {single.name} nor {INDEX}, without which "
            "transformers loads nothing; copy the missing file, or save the model again with save_pretrained"
        )
    raise UserError(f"{folder}: no *.safetensors files; convert the model with transformers' save_pretrained")


def _read(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({error}); copy it again") from None


def save_hf_folder(
    path: Path | str,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    extra: Mapping[str, str] | None = None,
    base: Path | None = None,
) -> None:
    """Writes a folder that AutoModelForCausalLM, SGLang and vLLM load; it appears when it is complete.

    Args:
        path: a new folder, or an earlier model, which is replaced.
        config: the model's sizes.
        tensors: Hugging Face names and tensors of one dtype.
        tokenizer: saved with the model; its EOS token ends generation.
        extra: further files by name.
        base: the model that it began as, whose generation settings and licence are kept.

    Raises:
        UserError: the path exists and is not a model.
    """
    folder = Path(path)
    if folder.is_file() or (
        folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists()
    ):
        raise UserError(f"{folder} exists and is not a Hugging Face model; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(work / "new", config, tensors, tokenizer, base)
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
    base: Path | None,
) -> None:
    folder.mkdir()
    dtype = _write_shards(folder, tensors)
    settings = config.to_hf(dtype)
    generation: dict[str, Any] = {"do_sample": True}
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
        generation, special = generation_of(tokenizer, base)
        settings |= special
    for file in [*legal_files(base), *base.glob("*.tiktoken")] if base and base.is_dir() else ():
        shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / GENERATION).write_text(json.dumps(generation, indent=2) + "\n")


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> torch.dtype:
    """Writes files of up to `SHARD_BYTES` and their index, one in memory at a time; returns the dtype."""
    shards: list[Path] = []
    places: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    total = size = 0
    dtype = torch.float32

    def write() -> None:
        shards.append(folder / f".shard_{len(shards)}")
        save_tensors(held, shards[-1])
        held.clear()

    for name, tensor in tensors:
        weight = tensor.contiguous().cpu()
        if held and size + weight.nbytes > SHARD_BYTES:
            write()
            size = 0
        dtype, places[name], held[name] = weight.dtype, len(shards), weight
        size += weight.nbytes
        total += weight.nbytes
    write()
    names = shard_names(len(shards))
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)
    if len(names) > 1:
        write_index(folder, {name: names[place] for name, place in places.items()}, total)
    return dtype


def shard_names(count: int) -> list[str]:
    """Returns transformers' names for `count` weight files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, files: Mapping[str, str], total: int) -> None:
    """Writes the index: the file of each tensor, and the total size in bytes."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(files)}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
