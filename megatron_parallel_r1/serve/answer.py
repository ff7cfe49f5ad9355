"""The bodies that a client gets, in OpenAI's shapes with `parallel` beside the text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_parallel_r1.serve.response_assembler import Delta, Script
from megatron_parallel_r1.serve.session import Question

Kind = Literal["chat", "text"]


@dataclass(frozen=True, slots=True)
class Answer:
    """Words one request's answer, whole or in chunks."""

    kind: Kind
    model: str
    question: Question
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, scripts: Sequence[Script], texts: Sequence[str]) -> dict[str, Any]:
        """The one body of an answer that is not streamed."""
        choices = []
        for index, (script, text) in enumerate(zip(scripts, texts, strict=True)):
            said = (
                {"message": {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}
            )
            choices.append(
                {
                    "index": index,
                    **said,
                    "logprobs": None,
                    "finish_reason": script.finish_reason,
                    "parallel": script.thoughts(),
                }
            )
        return self._body(choices, streamed=False) | {"usage": self.usage(scripts)}

    def opening(self) -> Iterator[dict[str, Any]]:
        """A chat's first chunks, which say who speaks."""
        if self.kind == "chat":
            for index in range(len(self.question.seeds)):
                yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def news(self, deltas: Sequence[Delta]) -> Iterator[dict[str, Any]]:
        """A chunk for each response that has grown."""
        for index, delta in enumerate(deltas):
            if not delta:
                continue
            chat = {"delta": {"content": delta.content} if delta.content else {}}
            said = chat if self.kind == "chat" else {"text": delta.content}
            yield self._chunk(index, said, parallel={"deltas": delta.voices})

    def closing(self, scripts: Sequence[Script], usage: bool) -> Iterator[dict[str, Any]]:
        """The last chunks: why each response ended, and what all took."""
        for index, script in enumerate(scripts):
            said: dict[str, Any] = {"delta": {}} if self.kind == "chat" else {"text": ""}
            yield self._chunk(index, said, finish_reason=script.finish_reason)
        if usage:
            yield self._body([], streamed=True) | {"usage": self.usage(scripts)}

    def usage(self, scripts: Sequence[Script]) -> dict[str, Any]:
        """Tokens; of `critical_path_tokens`, those of a block's longest path alone."""
        completion = sum(len(script.tokens) for script in scripts)
        return {
            "prompt_tokens": self.question.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.question.prompt_tokens + completion,
            "completion_tokens_details": {
                "critical_path_tokens": sum(script.critical_tokens for script in scripts)
            },
        }

    def _chunk(
        self,
        index: int,
        said: dict[str, Any],
        finish_reason: str | None = None,
        parallel: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": finish_reason}
        return self._body([choice | ({"parallel": parallel} if parallel else {})], streamed=True)

    def _body(self, choices: list[dict[str, Any]], streamed: bool) -> dict[str, Any]:
        prefix, name = ("chatcmpl", "chat.completion") if self.kind == "chat" else ("cmpl", "text_completion")
        return {
            "id": f"{prefix}-{self.id}",
            "object": f"{name}.chunk" if streamed and self.kind == "chat" else name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
