"""The native engine as a teacher; it decodes in parallel, with the rollout loop of training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
from megatron_parallel_r1.coldstart.settings import OwnEngine
from megatron_parallel_r1.coldstart.teacher import TeacherAnswer, TeacherRequest
from megatron_parallel_r1.data.prompts import decode, encode_prompt, template_text
from megatron_parallel_r1.data.tokenizers import open_thinking_tokenizer
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.thinking import Thinker
from megatron_parallel_r1.run.context import native_engine
from megatron_parallel_r1.thought.format_settings import FormatSetting, format_of
from megatron_parallel_r1.utils.hub import local_folder
from megatron_parallel_r1.utils.rank import world_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@contextmanager
def open_engine(
    settings: OwnEngine, template: str, format: FormatSetting, seed: int
) -> Iterator[EngineTeacher]:
    """Opens the teacher with the weights of its folder, in a single process.

    Args:
        template: the prompt template of all requests.
        format: of the traces.

    Raises:
        UserError: the folder holds no model, a model without the tags, or one that was trained with another
            template or format; or several processes were launched.
    """
    if world_size() > 1:
        raise UserError("coldstart: a teacher of kind engine is one process; start it without a launcher")
    folder = local_folder(settings.path)
    _check_template(folder, template)
    shape, tensors = load_hf_folder(folder)
    tokenizer, tags = open_thinking_tokenizer(folder)
    if tags.format != (wanted := format_of(format)):
        raise UserError(
            f"{folder}: the model thinks in the format {tags.format.name}, and the traces are to be in "
            f"{wanted.name}; set format to that of the model"
        )
    thinking = settings.thinking.replace(format=format)
    with process.running(seed):
        engine = native_engine(shape)
        engine.load_weights(tensors, version=0)
        name = json.dumps([weights_of(folder), settings.thinking.model_dump()], sort_keys=True)
        yield EngineTeacher(Thinker(engine, tags, thinking), tokenizer, name)


def _check_template(folder: Path, template: str) -> None:
    """Requires the prompt template of the model's training, whose text is in `thinking.json`."""
    stored = folder / "thinking.json"
    if not stored.is_file():
        return
    try:
        record = json.loads(stored.read_text(encoding="utf-8"))
        text, name = record.get("prompt_template"), record.get("prompt")
    except (ValueError, AttributeError):
        raise UserError(f"{stored}: not a JSON object; release the model again, or delete the file") from None
    if text is not None and text != template_text(template):
        raise UserError(f"{stored}: the model was trained with the prompt {name!r}; set template to that")


def weights_of(folder: Path) -> list[tuple[str, int, int]]:
    """Identifies the weights: name, size in bytes and modification time (ns) of each file."""
    files = sorted(folder.glob("*.safetensors"))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


class EngineTeacher:
    """Decodes a trace per request; the engine batches concurrent requests.

    Args:
        name: identifies this model and these settings.
    """

    def __init__(self, thinker: Thinker[Any], tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self._thinker = thinker
        self._tokenizer = tokenizer
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    async def answer(self, request: TeacherRequest) -> TeacherAnswer:
        prompt = encode_prompt(self._tokenizer, request.template, request.problem)
        engine = self._thinker.engine
        context = engine.open()
        try:
            await engine.write(context, prompt)
            trace = await self._thinker.trace(prompt, context, request.seed)
        finally:
            engine.close(context)
        text = decode(self._tokenizer, trace.tokens)
        return TeacherAnswer(text, "stop" if trace.finish == "eos" else "length")
