"""Loads a released folder: weights in an engine, tokenizer, and the decoding settings of the training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
from megatron_parallel_r1.data.embedded.congruence import vocabulary
from megatron_parallel_r1.data.embedded.generate import evaluation_problems
from megatron_parallel_r1.data.prompts import template_columns
from megatron_parallel_r1.data.tokenizers import open_thinking_tokenizer
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.checkpoints import stored_decoding
from megatron_parallel_r1.rollout.engine import Engine
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.servers.engine import ServerEngine
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.thought.tags import Tags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 4  # most on the page
SERVER_DRAW = 16


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that is ready to decode.

    Attributes:
        name: of the model in the API.
        template: prompt template of the training, with `{problem}` in it.
        vocabulary: number of token ids.
        positions: longest sequence, prompt and response together.
        examples: problems of the kind that it was trained on, for the page.
        engine_name: `native`, `sglang` or `vllm`.
    """

    name: str
    engine: Engine[Any]
    tokenizer: PreTrainedTokenizerBase
    tags: Tags
    thinking: Thinking
    template: str
    vocabulary: int
    positions: int
    examples: tuple[str, ...] = ()
    engine_name: str = "native"

    @property
    def draws_at_once(self) -> int:
        """Tokens of one draw: a draw of servers is a request."""
        return 1 if self.engine_name == "native" else SERVER_DRAW

    @property
    def gauges(self) -> dict[str, float]:
        """The engine's load: `cache_tokens`, of servers `servers` and `servers_up`."""
        if isinstance(self.engine, ServerEngine):
            pool = self.engine.pool.gauges()
            return {"cache_tokens": 0} | {name: pool[name] for name in ("servers", "servers_up")}
        return {"cache_tokens": self.engine.cached_tokens if isinstance(self.engine, NativeEngine) else 0}

    @classmethod
    def load(
        cls,
        folder: Path,
        name: str | None = None,
        device: str | None = None,
        engine_name: str = "native",
        connect: Callable[[Thinking], Engine[Any]] | None = None,
    ) -> ServedModel:
        """Loads a released folder.

        Args:
            name: default: the folder's name, or its parent's where the folder is called `release`.
            device: default: the GPU, if there is one.
            connect: gives the engine, which holds the folder's weights; None: the native one.

        Raises:
            UserError: a file is missing or does not match the others, or the engine cannot serve it.
        """
        config, tensors = load_hf_folder(folder)
        settings = folder / "thinking.json"
        if not settings.is_file():
            raise UserError(
                f"{folder}: no thinking.json, which has the decoding settings; give a `release` folder"
            )
        decoding = stored_decoding(settings)
        if columns := template_columns(decoding.template):
            raise UserError(
                f"{settings}: its prompt shows columns of the data ({', '.join(columns)}), which no request "
                "has; serve a model whose prompt has {problem} alone"
            )
        tokenizer, tags = open_thinking_tokenizer(folder)
        if max(tokenizer.get_vocab().values()) >= config.vocab:
            raise UserError(
                f"{folder}: the tokenizer has tokens that the model lacks; take both from one run"
            )
        positions = config.max_positions
        engine: Engine[Any]
        if connect is None:
            engine = NativeEngine(config)
            where = _device(device)
            engine.load_weights(((key, tensor.to(where)) for key, tensor in tensors), version=0)
        else:
            engine = connect(decoding.thinking)
            _check_servers(engine, engine_name, decoding.thinking, settings)
        if isinstance(engine, ServerEngine):
            positions = min(positions, *(info.max_tokens for info in engine.pool.infos.values()))
        resolved = folder.resolve()
        return cls(
            name=name or (resolved.parent.name if resolved.name == "release" else resolved.name),
            engine=engine,
            tokenizer=tokenizer,
            tags=tags,
            thinking=decoding.thinking,
            template=decoding.template,
            vocabulary=config.vocab,
            positions=positions,
            examples=_examples(settings, tokenizer),
            engine_name=engine_name,
        )


def _check_servers(engine: Engine[Any], name: str, thinking: Thinking, settings: Path) -> None:
    if thinking.mode not in engine.modes:
        raise UserError(
            f"{settings}: mode {thinking.mode}, and the {name} servers are exact in "
            f"{', '.join(sorted(engine.modes))}; start SGLang by serve-rollout --isolated"
        )
    if name == "vllm" and cuts_distribution(thinking):
        raise UserError(
            f"{settings}: top_p or top_k, and vLLM servers draw from all tokens only; use --engine sglang"
        )


def cuts_distribution(thinking: Thinking) -> bool:
    """Whether tokens are drawn from the most likely ones only."""
    return thinking.temperature > 0 and (thinking.top_k > 0 or thinking.top_p < 1)


def _examples(settings: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts under "examples" in thinking.json, else held-out problems if the words are the embedded ones.

    Raises:
        UserError: "examples" is no list of texts.
    """
    listed = json.loads(settings.read_text(encoding="utf-8")).get("examples")
    if listed is None:
        if not tokenizer.get_vocab().keys() >= set(vocabulary()):
            return ()
        listed = [problem.prompt for problem in evaluation_problems("hard", EXAMPLES)]
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise UserError(f"{settings}: examples must be a list of problem texts; correct it or leave it out")
    return tuple(listed[:EXAMPLES])


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name}: {reason}; use cpu, or cuda where there is a GPU") from None
    return device
