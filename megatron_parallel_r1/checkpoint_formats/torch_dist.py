"""Reading weights out of Megatron's distributed checkpoints ("torch_dist"), without Megatron or its ranks.

Such a checkpoint holds whole tensors in pieces, whatever the layout was that wrote it. Their names are those
of Megatron's own modules, but for norms that Transformer Engine fuses into the matrix behind them, and
experts, which are rows of one tensor of a rank more. Megatron-LM may also stack all layers in that way.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import WeightMapping, weight_table
from megatron_parallel_r1.checkpoint_formats.safetensors_file import StoredTensor
from megatron_parallel_r1.checkpoint_formats.torch_save import OddStrides, find_tensor
from megatron_parallel_r1.errors import UserError

Empty = Callable[[Sequence[int], torch.dtype], Tensor]

TRACKER = "latest_checkpointed_iteration.txt"
# What else a training run keeps beside its weights.
_NO_WEIGHTS = ("optimizer.", "rng_state", "rerun_state", "opt_param_scheduler", "chained_")


def _empty(sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(sizes), dtype=dtype)


def checkpoint_key(weight: WeightMapping, has_experts: bool) -> str:
    """The name of the whole tensor that `weight` is, or of which it is row `weight.expert`.

    Args:
        has_experts: whether the model has; the norm before a router is fused into nothing.
    """
    name = weight.name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    if not has_experts:
        name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    if weight.expert is not None:
        name = name.replace(f".local_experts.{weight.expert}.", ".experts.")
    return name


def _places(weight: WeightMapping, has_experts: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Where a checkpoint may have a weight: the name of a tensor, and which of its rows."""
    expert = () if weight.expert is None else (weight.expert,)
    for name in (checkpoint_key(weight, has_experts), weight.name):
        yield name, expert
        if weight.layer is not None:
            yield name.replace(f".layers.{weight.layer}.", ".layers.", 1), (weight.layer, *expert)


def find_checkpoint(path: Path) -> Path | None:
    """The folder with the pieces: `path` itself, or that which its tracker names; None if neither is."""
    if (path / ".metadata").is_file():
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        return None
    word = tracker.read_text().strip()
    folder = path / (f"iter_{int(word):07d}" if word.isdigit() else word)
    if not (folder / ".metadata").is_file():
        raise UserError(
            f"{tracker} names {folder.name}, which holds no distributed checkpoint; copy it again"
        )
    return folder


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a tensor of a checkpoint is, in which file, and which rectangle of the whole it is."""

    file: Path
    begin: int
    length: int
    corner: tuple[int, ...]
    sizes: tuple[int, ...]


class MegatronCheckpoint:
    """A distributed checkpoint, its index in memory.

    Args:
        once: whether nobody will read its weights soon again; see `FileBytes`.

    Attributes:
        folder: with the pieces.
        sizes: of all its tensors.
        dtypes: likewise.

    Raises:
        UserError: there is none in `path`, or its index is damaged.
    """

    def __init__(self, path: Path, once: bool = False) -> None:
        self._once = once
        folder = find_checkpoint(path)
        if folder is None:
            raise UserError(
                f"{path}: no distributed checkpoint of Megatron (.metadata is missing); give its folder. "
                "A legacy one (mp_rank_…) has first to be saved anew with --ckpt-format torch_dist"
            )
        self.folder = folder
        try:
            self._metadata: Metadata = FileSystemReader(folder).read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError, OSError, ImportError) as error:
            raise UserError(f"{folder}/.metadata is damaged ({error}); copy it again") from None
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: told
            for key, told in self._metadata.state_dict_metadata.items()
            if isinstance(told, TensorStorageMetadata)
        }
        self.sizes: Mapping[str, tuple[int, ...]] = {key: tuple(t.size) for key, t in self._tensors.items()}
        self.dtypes: Mapping[str, torch.dtype] = {key: t.properties.dtype for key, t in self._tensors.items()}

    @property
    def weight_keys(self) -> set[str]:
        """Those that are weights of a model."""
        return {
            key for key in self.sizes if not key.startswith(_NO_WEIGHTS) and not key.endswith("_extra_state")
        }

    def check(self, shape: ModelConfig) -> None:
        """Holds names and sizes against a model.

        Raises:
            UserError: a tensor is missing, unknown or of another size.
        """
        problems, used = [], set()
        for weight in weight_table(shape):
            found = self._located(weight, shape)
            if found is None:
                problems.append(f"{checkpoint_key(weight, shape.experts is not None)} is missing")
                continue
            key, index = found
            used.add(key)
            size = self.sizes[key][len(index) :]
            fits = size == weight.shape
            if weight.vocabulary:  # filled up by whoever wrote it
                fits = size[1:] == weight.shape[1:] and size[0] >= weight.shape[0]
            if not fits:
                problems.append(f"{key} is {self.sizes[key]} instead of {weight.shape}")
        problems += [f"{key} is unknown" for key in self.weight_keys - used]
        if problems:
            shown = "; ".join(sorted(problems)[:5])
            more = f"; and {len(problems) - 5} more" if problems[5:] else ""
            raise UserError(
                f"{self.folder} does not fit the model: {shown}{more}. Give the config.json of this model"
            )

    def dtype(self, weight: WeightMapping, shape: ModelConfig) -> torch.dtype:
        """Of a weight that `check` has found."""
        return self.dtypes[self._located(weight, shape)[0]]

    @torch.no_grad()
    def read(
        self,
        weight: WeightMapping,
        shape: ModelConfig,
        empty: Empty = _empty,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """The Megatron parameter, its vocabulary cut to the model's.

        Args:
            empty: gives the memory that it is read into.
            start, stop: the rows that are wanted; None: to the last.

        Raises:
            UserError: a piece cannot be read, or one is missing.
        """
        key, index = self._located(weight, shape)
        stop = weight.shape[0] if stop is None else stop
        out = empty((stop - start, *weight.shape[1:]), self.dtypes[key])
        filled = 0
        for piece in self.pieces(key):
            lead = tuple(zip(piece.corner, piece.sizes, strict=True))[: len(index)]
            if not all(first <= i < first + size for i, (first, size) in zip(index, lead, strict=True)):
                continue
            (top, *left), (rows, *widths) = piece.corner[len(index) :], piece.sizes[len(index) :]
            first, last = max(start, top), min(stop, top + rows)
            if first >= last:
                continue
            columns = (slice(begin, begin + width) for begin, width in zip(left, widths, strict=True))
            target = out[(slice(first - start, last - start), *columns)]
            above = 0
            for i, (begin, size) in zip(index, lead, strict=True):
                above = above * size + i - begin
            self._read_into(target, key, piece, (rows, *widths), above * rows + first - top)
            filled += target.numel()
        if filled != out.numel():
            raise UserError(f"{self.folder}: pieces of {key} are missing; copy the checkpoint again")
        return out

    def pieces(self, key: str) -> list[Piece]:
        """Of a tensor."""
        made = []
        for chunk in self._tensors[key].chunks:
            told = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            if getattr(told, "transform_descriptors", None):
                raise UserError(f"{self.folder}: {key} is stored transformed; save it without extensions")
            made.append(
                Piece(
                    self.folder / told.relative_path,
                    told.offset,
                    told.length,
                    tuple(chunk.offsets),
                    tuple(chunk.sizes),
                )
            )
        return made

    def _read_into(self, target: Tensor, key: str, piece: Piece, sizes: tuple[int, ...], row: int) -> None:
        """Fills `target` with the rows from `row` on of the tensors of `sizes` that a piece holds."""
        if not target.numel():
            return
        try:
            with piece.file.open("rb") as stream:
                if piece.file.stat().st_size < piece.begin + piece.length:
                    raise UserError(f"{piece.file} ends within {key}; copy it again")
                held = find_tensor(stream, piece.begin, piece.length)
        except OSError as error:
            raise UserError(f"{piece.file} cannot be read ({error.strerror}); copy it again") from None
        except OddStrides as error:
            raise UserError(f"{piece.file}: {key} is not contiguous ({error}); save it so") from None
        except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise UserError(f"{piece.file}: {key} is damaged ({error}); copy it again") from None
        if prod(held.shape) != prod(piece.sizes):
            raise UserError(f"{piece.file}: {key} is of sizes {held.shape} instead of {piece.sizes}")
        rows, rest = sizes[0], sizes[1:]
        count = prod(piece.sizes) // prod(sizes)
        stored = StoredTensor(piece.file, key, held.dtype, (count * rows, *rest), held.begin, self._once)
        stored.read_into(target[None], row)

    def _located(self, weight: WeightMapping, shape: ModelConfig) -> tuple[str, tuple[int, ...]] | None:
        places = _places(weight, shape.experts is not None)
        return next(((key, index) for key, index in places if key in self.sizes), None)


def read_weights(checkpoint: MegatronCheckpoint, shape: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """All weights under their Hugging Face names, one after another."""
    for weight in weight_table(shape):
        yield from zip(
            (name for name, _ in weight.parts), weight.split([checkpoint.read(weight, shape)]), strict=True
        )
