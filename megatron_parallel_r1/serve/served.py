"""A released folder, ready to answer: weights in an engine, tokenizer, settings of the training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_parallel_r1.checkpoint_formats.hf_folder import hf_sizes, load_hf_folder
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.checkpoints import stored_decoding
from megatron_parallel_r1.evaluation.modes import Decoding
from megatron_parallel_r1.model.weights import check_fit
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.native.model import Architecture
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.run.datasets import open_tokenizer
from megatron_parallel_r1.thought.tags import Tags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Served:
    """What the server answers with.

    Attributes:
        name: under which clients ask for it.
        template: the prompt of the training, `{problem}` in it.
        vocabulary: token ids are below it.
        positions: that the model knows: prompt and response together.
    """

    name: str
    engine: NativeEngine
    tokenizer: PreTrainedTokenizerBase
    tags: Tags
    thinking: Thinking
    template: str
    vocabulary: int
    positions: int

    @property
    def cached_tokens(self) -> int:
        """That some request under way holds in the engine's cache."""
        return self.engine.cached_tokens

    @classmethod
    def load(cls, folder: Path, name: str | None = None, device: str | None = None) -> Served:
        """Reads a released folder.

        Args:
            name: default: the folder's, or its parent's where it is just `release`.
            device: default: the GPU, if there is one.

        Raises:
            UserError: a file is missing or does not fit.
        """
        shape, tensors = load_hf_folder(folder)
        check_fit(shape, hf_sizes(folder))
        told = _read_thinking(folder / "thinking.json")
        tokenizer = open_tokenizer(folder)
        try:
            tags = Tags.of(tokenizer)
        except ValueError as error:
            raise UserError(
                f"{folder}: {error}; give a model that was trained to think in parallel"
            ) from None
        if max(tokenizer.get_vocab().values()) >= shape.vocab:
            raise UserError(
                f"{folder}: the tokenizer has tokens that the model lacks; take both from one run"
            )
        engine = NativeEngine(Architecture.of(shape))
        where = _device(device)
        engine.load_weights(((key, tensor.to(where)) for key, tensor in tensors), version=0)
        place = folder.resolve()
        called = name or (place.parent.name if place.name == "release" else place.name)
        sizes = (shape.vocab, shape.max_positions)
        return cls(called, engine, tokenizer, tags, told.thinking, told.template, *sizes)


def _read_thinking(file: Path) -> Decoding:
    if not file.is_file():
        raise UserError(
            f"{file.parent}: no thinking.json, which says how the model thinks; give a `release` folder"
        )
    return stored_decoding(file)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name}: {reason}; use cpu, or cuda where there is a GPU") from None
    return device
