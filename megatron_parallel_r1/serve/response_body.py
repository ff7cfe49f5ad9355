"""Response bodies in OpenAI's shapes, with `parallel` beside the text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_parallel_r1.serve.engine_request import EngineRequest
from megatron_parallel_r1.serve.logprobs import LogprobWriter, Scored
from megatron_parallel_r1.serve.response_assembler import Delta, ResponseAssembler

Endpoint = Literal["chat", "text"]


@dataclass(frozen=True, slots=True)
class ResponseBody:
    """Writes the response to one request, whole or in chunks.

    Attributes:
        writers: of each choice's log-probs.
    """

    endpoint: Endpoint
    model: str
    request: EngineRequest
    writers: list[LogprobWriter]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self, responses: Sequence[ResponseAssembler], deltas: Sequence[Sequence[Delta]]
    ) -> dict[str, Any]:
        """The body of a response that is not streamed, of all deltas of each choice."""
        choices = []
        for index, (response, own) in enumerate(zip(responses, deltas, strict=True)):
            text = "".join(delta.content for delta in own)
            chat = {"message": {"role": "assistant", "content": text}}
            choices.append(
                {
                    "index": index,
                    **(chat if self.endpoint == "chat" else {"text": text}),
                    "logprobs": self._logprobs(index, [pair for delta in own for pair in delta.scored]),
                    "finish_reason": response.finish_reason,
                    "parallel": response.parallel(),
                }
            )
        return self._body(choices, streamed=False) | {"usage": self.usage(responses)} | self._warnings

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """The role of each choice of a chat; warnings, if there are any."""
        if self.endpoint == "chat":
            for index in range(len(self.request.seeds)):
                chunk = self._chunk(index, {"delta": {"role": "assistant", "content": ""}})
                yield chunk if index else chunk | self._warnings
        elif self.request.warnings:
            yield self._chunk(0, {"text": ""}) | self._warnings

    def chunks(self, deltas: Sequence[Delta]) -> Iterator[dict[str, Any]]:
        """A chunk for each response that has grown."""
        for index, delta in enumerate(deltas):
            if not delta:
                continue
            chat = {"delta": {"content": delta.content} if delta.content else {}}
            content = chat if self.endpoint == "chat" else {"text": delta.content}
            logprobs = self._logprobs(index, delta.scored)
            yield self._chunk(index, content, parallel={"deltas": delta.branches}, logprobs=logprobs)

    def last_chunks(self, responses: Sequence[ResponseAssembler], usage: bool) -> Iterator[dict[str, Any]]:
        """The finish reason of each response and, if `usage` is set, the token counts."""
        for index, response in enumerate(responses):
            content: dict[str, Any] = {"delta": {}} if self.endpoint == "chat" else {"text": ""}
            yield self._chunk(index, content, finish_reason=response.finish_reason)
        if usage:
            yield self._body([], streamed=True) | {"usage": self.usage(responses)}

    def usage(self, responses: Sequence[ResponseAssembler]) -> dict[str, Any]:
        """Token counts; `critical_path_tokens` counts only the longest path of each block."""
        completion = sum(len(response.tokens) for response in responses)
        return {
            "prompt_tokens": self.request.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.request.prompt_tokens + completion,
            "completion_tokens_details": {
                "critical_path_tokens": sum(response.critical_tokens for response in responses)
            },
        }

    @property
    def _warnings(self) -> dict[str, list[str]]:
        return {"warnings": list(self.request.warnings)} if self.request.warnings else {}

    def _logprobs(self, index: int, scored: Scored) -> dict[str, Any] | None:
        if self.request.alternatives is None:
            return None
        writer = self.writers[index]
        return writer.chat(scored) if self.endpoint == "chat" else writer.text(scored)

    def _chunk(
        self,
        index: int,
        content: dict[str, Any],
        finish_reason: str | None = None,
        parallel: dict[str, Any] | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._body([choice | ({"parallel": parallel} if parallel else {})], streamed=True)

    def _body(self, choices: list[dict[str, Any]], streamed: bool) -> dict[str, Any]:
        chat = self.endpoint == "chat"
        prefix, name = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        return {
            "id": f"{prefix}-{self.id}",
            "object": f"{name}.chunk" if streamed and chat else name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
