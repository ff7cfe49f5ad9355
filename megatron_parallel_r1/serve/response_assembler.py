"""One response while it grows: who said what, and the flat text that a plain client reads.

Paths grow side by side; the flat text has them one after the other. So it waits: the first path's text runs
on live, a later path's comes as soon as those before it have ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.serve.detokenizer import Detokenizer
from megatron_parallel_r1.serve.stops import StopCutter
from megatron_parallel_r1.serve.token_stream import Place
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.trace import Finish

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAIN: Place = ()


@dataclass(slots=True)
class _Voice:
    """What was said at one place: the main text, a path, or a block's closing tags with its summary.

    `texts` has one text more than the place has opened blocks; each block stands between two of them.
    """

    words: Detokenizer
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=lambda: [""])
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new: of the flat text, and of each voice (docs/serving.md has the shape)."""

    content: str
    voices: list[dict[str, Any]]

    def __bool__(self) -> bool:
        return bool(self.content or self.voices)


class Script:
    """Fed by `hear` and at last `end`; `take` gives what is new.

    Args:
        stops: texts that end the response where the main text has them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tags: Tags, stops: tuple[str, ...] = ()) -> None:
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self._tokenizer = tokenizer
        self._tags = tags
        self._voices: dict[Place, _Voice] = {}
        self._flat = Detokenizer(tokenizer)
        self._cutter = StopCutter(stops)
        self._reader = self._read_chain(MAIN)
        self._content: list[str] = []
        self._news: dict[Place, dict[str, Any]] = {}
        self._voice(MAIN)

    @property
    def stopped(self) -> bool:
        """A stop sequence was met; the rest is not heard."""
        return self._cutter.hit

    @property
    def finish_reason(self) -> str:
        return "length" if self.finish == "length" and not self.stopped else "stop"

    @property
    def critical_tokens(self) -> int:
        """Tokens one behind the other, of each block the longest path: what the response's time follows."""
        return self._critical(MAIN)

    def hear(self, place: Place, token: int) -> None:
        """Takes the next token of one place."""
        if self.stopped:
            return
        voice = self._voice(place)
        voice.tokens.append(token)
        self._advance()
        if place != MAIN:
            self._speak(place, voice, token)

    def end(self, finish: Finish) -> None:
        """No further token comes."""
        self.finish = finish
        if self.stopped:
            return
        self._advance()
        rest = self._cutter.add(self._flat.finish())
        self._say_main(rest if self.stopped else rest + self._cutter.finish())
        self._voices[MAIN].closed = finish == "eos"

    def take(self) -> Delta:
        """What is new since the last call."""
        delta = Delta("".join(self._content), list(self._news.values()))
        self._content, self._news = [], {}
        return delta

    def thoughts(self) -> dict[str, Any]:
        """The whole response as main text, blocks, paths and summaries."""
        return self._chain(MAIN)

    def _voice(self, place: Place) -> _Voice:
        if place not in self._voices:
            self._voices[place] = _Voice(Detokenizer(self._tokenizer))
        return self._voices[place]

    def _advance(self) -> None:
        """Reads on in the flat order as far as it is known."""
        while not self.stopped and (read := next(self._reader, None)) is not None:
            place, token = read
            self.tokens.append(token)
            piece = self._flat.add(token)
            if place == MAIN and token != self._tags.parallel:
                self._say_main(self._cutter.add(piece))
                continue
            self._say_main(self._cutter.finish())
            self._content.append(piece)
            if place == MAIN:
                self._voices[MAIN].texts.append("")

    def _say_main(self, text: str) -> None:
        if text:
            self._content.append(text)
            self._voices[MAIN].texts[-1] += text
            self._new(MAIN)["text"] += text

    def _speak(self, place: Place, voice: _Voice, token: int) -> None:
        """A token of a path or summary, told at once whatever the flat text waits for."""
        tags = self._tags
        news = self._new(place)
        in_path = len(place) % 2 == 0
        opening = 1 if in_path else 2  # <Path>, or </Parallel> <Summary>
        if len(voice.tokens) <= opening:
            return
        if token == (tags.path_end if in_path else tags.summary_end):
            piece, voice.closed, news["closed"] = voice.words.finish(), True, True
        elif in_path and token == tags.parallel:
            voice.texts[-1] += (piece := voice.words.finish())
            news["text"] += piece
            voice.texts.append("")
            return
        else:
            piece = voice.words.add(token)
        voice.texts[-1] += piece
        news["text"] += piece

    def _new(self, place: Place) -> dict[str, Any]:
        part = "main" if place == MAIN else "summary" if len(place) % 2 else "path"
        return self._news.setdefault(place, {"at": list(place), "part": part, "text": ""})

    def _read_chain(self, place: Place) -> Iterator[tuple[Place, int] | None]:
        """(place, token) in flat order of the main text or a path with its blocks; None: not known yet."""
        blocks = 0
        for read in self._read(place):
            yield read
            if read is not None and read[1] == self._tags.parallel:
                blocks += 1
                yield from self._read_block((*place, blocks))

    def _read_block(self, place: Place) -> Iterator[tuple[Place, int] | None]:
        index = 0
        while place not in self._voices or (*place, index) in self._voices:
            if (*place, index) in self._voices:
                yield from self._read_chain((*place, index))
                index += 1
            elif self.finish is not None:
                return
            else:
                yield None
        yield from self._read(place)

    def _read(self, place: Place) -> Iterator[tuple[Place, int] | None]:
        """The tokens of one place until its last."""
        tags, index = self._tags, 0
        tokens = self._voices[place].tokens
        last = None if place == MAIN else tags.summary_end if len(place) % 2 else tags.path_end
        while True:
            if index < len(tokens):
                yield place, tokens[index]
                index += 1
                if tokens[index - 1] == last:
                    return
            elif self.finish is not None:
                return
            else:
                yield None

    def _paths(self, block: Place) -> Iterator[Place]:
        index = 0
        while (*block, index) in self._voices:
            yield (*block, index)
            index += 1

    def _blocks(self, place: Place) -> Iterator[Place]:
        for number in range(1, len(self._voices[place].texts)):
            yield (*place, number)

    def _critical(self, place: Place) -> int:
        count = len(self._voices[place].tokens)
        for block in self._blocks(place):
            count += max((self._critical(path) for path in self._paths(block)), default=0)
            count += len(self._voices[block].tokens) if block in self._voices else 0
        return count

    def _chain(self, place: Place) -> dict[str, Any]:
        voice = self._voices[place]
        return {
            "texts": voice.texts,
            "tokens": len(voice.tokens),
            "closed": voice.closed,
            "blocks": [
                {"paths": [self._chain(path) for path in self._paths(block)], "summary": self._summary(block)}
                for block in self._blocks(place)
            ],
        }

    def _summary(self, block: Place) -> dict[str, Any] | None:
        if block not in self._voices:
            return None
        voice = self._voices[block]
        return {"text": voice.texts[0], "tokens": len(voice.tokens), "closed": voice.closed}
