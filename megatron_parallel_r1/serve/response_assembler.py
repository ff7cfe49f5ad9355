"""Assembles a response while it grows: the text of each branch, and the flat text for plain clients.

Paths grow side by side, while the flat text has one after another: the first path's text streams live, and a
later path's follows as soon as those before it have ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.report.traces import stated_answer
from megatron_parallel_r1.rollout.engine import TokenScore
from megatron_parallel_r1.rollout.thinking import FORCED, Branch
from megatron_parallel_r1.serve.text import Detokenizer, StopCutter
from megatron_parallel_r1.thought.parser import Parser
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.trace import Finish

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAIN: Branch = ()
_Read = tuple[Branch, int, bool]
"""Branch and token, and whether a block forks behind it."""


@dataclass(slots=True)
class _BranchText:
    """Tokens and text of one branch: the main text, a path, or a block's closing tags with its summary.

    `texts` has one text more than the branch has opened blocks; each block stands between two of them.
    `scores` waits for the flat text.
    """

    detokenizer: Detokenizer
    tokens: list[int] = field(default_factory=list)
    scores: deque[TokenScore] = field(default_factory=deque)
    texts: list[str] = field(default_factory=lambda: [""])
    closed: bool = False
    parser: Parser | None = None

    def forks(self, token: int, tags: Tags) -> bool:
        """Whether a block forks behind the next token of this path."""
        self.parser = self.parser or Parser(tags)
        self.parser.feed(token)
        if forks := self.parser.forks:
            self.parser = None
        return forks


@dataclass(frozen=True, slots=True)
class Delta:
    """New text since the last delta: of the flat text, and of each branch (format in docs/serving.md).

    `scored` are the new tokens of the flat text with their scores, where they are kept; None: the first token
    of an echoed prompt.
    """

    content: str
    branches: list[dict[str, Any]]
    scored: list[tuple[int, TokenScore | None]]

    def __bool__(self) -> bool:
        return bool(self.content or self.branches or self.scored)


class ResponseAssembler:
    """Takes the tokens of a response in any order of branches; `take_delta` returns what is new.

    Args:
        stops: texts that end the response where they occur in the main text.
        scored: keep the scores of tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tags: Tags,
        stops: tuple[str, ...] = (),
        scored: bool = False,
    ) -> None:
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self._tokenizer = tokenizer
        self._tags = tags
        self._scored = scored
        self._new_scored: list[tuple[int, TokenScore | None]] = []
        self._branches: dict[Branch, _BranchText] = {}
        self._flat = Detokenizer(tokenizer)
        self._cutter = StopCutter(stops)
        self._reader = self._read_chain(MAIN)
        self._new_content: list[str] = []
        self._new_text: dict[Branch, dict[str, Any]] = {}
        self._branch(MAIN)

    @property
    def stopped(self) -> bool:
        """Whether a stop sequence was met; later tokens are ignored."""
        return self._cutter.hit

    @property
    def finish_reason(self) -> str:
        return "length" if self.finish == "length" and not self.stopped else "stop"

    @property
    def critical_tokens(self) -> int:
        """Tokens on the critical path, with only the longest path of each block."""
        return self._critical(MAIN)

    def echo(self, prompt: Sequence[int], scores: Sequence[TokenScore]) -> None:
        """Begins the flat text with the prompt; `scores` are of all its tokens but the first."""
        self._new_content += map(self._flat.add, prompt)
        if self._scored:
            self._new_scored += zip(prompt, [None, *scores], strict=True)

    def add(self, branch: Branch, token: int, score: TokenScore = FORCED) -> None:
        """Appends the next token of a branch."""
        if self.stopped:
            return
        text = self._branch(branch)
        text.tokens.append(token)
        if self._scored:
            text.scores.append(score)
        self._advance()
        if branch != MAIN:
            self._add_inner(branch, text, token)

    def end(self, finish: Finish) -> None:
        """Completes the response after its last token."""
        self.finish = finish
        if self.stopped:
            return
        self._advance()
        rest = self._cutter.add(self._flat.finish())
        self._add_main(rest if self.stopped else rest + self._cutter.finish())
        self._branches[MAIN].closed = finish == "eos"

    def take_delta(self) -> Delta:
        """Returns and clears what is new since the last call."""
        delta = Delta("".join(self._new_content), list(self._new_text.values()), self._new_scored)
        self._new_content, self._new_text, self._new_scored = [], {}, []
        return delta

    def parallel(self) -> dict[str, Any]:
        """The whole response as main text, blocks, paths and summaries."""
        return self._chain(MAIN)

    def _branch(self, branch: Branch) -> _BranchText:
        if branch not in self._branches:
            self._branches[branch] = _BranchText(Detokenizer(self._tokenizer))
        return self._branches[branch]

    def _advance(self) -> None:
        """Extends the flat text by all tokens whose predecessors are known."""
        while not self.stopped and (read := next(self._reader, None)) is not None:
            branch, token, forks = read
            self.tokens.append(token)
            if self._scored:
                self._new_scored.append((token, self._branches[branch].scores.popleft()))
            piece = self._flat.add(token)
            if branch == MAIN and not forks:
                self._add_main(self._cutter.add(piece))
                continue
            self._add_main(self._cutter.finish())
            self._new_content.append(piece)
            if branch == MAIN:
                self._branches[MAIN].texts.append("")

    def _add_main(self, text: str) -> None:
        if text:
            self._new_content.append(text)
            self._branches[MAIN].texts[-1] += text
            self._new(MAIN)["text"] += text

    def _add_inner(self, branch: Branch, text: _BranchText, token: int) -> None:
        """Adds a token to the text of its path or summary, without waiting for the flat text."""
        tags = self._tags
        in_path = len(branch) % 2 == 0
        if not in_path and tags.summary_end is None:
            return
        new = self._new(branch)
        forced = tags.path_begin(branch[-1] + 1) if in_path else tags.joined
        if len(text.tokens) <= len(forced) or text.closed:
            return
        if token == (tags.path_end if in_path else tags.summary_end):
            piece, text.closed, new["closed"] = text.detokenizer.finish(), True, True
            if in_path:
                new["answer"] = stated_answer(" ".join([*text.texts, piece]))
        elif in_path and text.forks(token, tags):
            text.texts[-1] += (piece := text.detokenizer.finish())
            new["text"] += piece
            text.texts.append("")
            return
        else:
            piece = text.detokenizer.add(token)
        text.texts[-1] += piece
        new["text"] += piece

    def _new(self, branch: Branch) -> dict[str, Any]:
        part = "main" if branch == MAIN else "summary" if len(branch) % 2 else "path"
        return self._new_text.setdefault(branch, {"at": list(branch), "part": part, "text": ""})

    def _read_chain(self, branch: Branch) -> Iterator[_Read | None]:
        """Yields tokens in flat order of the main text or a path, blocks included; None: not known yet."""
        blocks, parser = 0, Parser(self._tags)
        for read in self._read(branch):
            if read is not None:
                parser.feed(read[1])
            forks = parser.forks
            yield read and (branch, read[1], forks)
            if forks:
                blocks, parser = blocks + 1, Parser(self._tags)
                yield from self._read_block((*branch, blocks))

    def _read_block(self, block: Branch) -> Iterator[_Read | None]:
        index = 0
        while block not in self._branches or (*block, index) in self._branches:
            if (*block, index) in self._branches:
                yield from self._read_chain((*block, index))
                index += 1
            elif self.finish is not None:
                return
            else:
                yield None
        yield from self._read(block)

    def _read(self, branch: Branch) -> Iterator[_Read | None]:
        """The tokens of one branch up to its last."""
        index, tokens = 0, self._branches[branch].tokens
        while True:
            if index < len(tokens):
                yield branch, tokens[index], False
                index += 1
                if self._is_complete(branch, tokens[:index]):
                    return
            elif self.finish is not None:
                return
            else:
                yield None

    def _is_complete(self, branch: Branch, tokens: Sequence[int]) -> bool:
        """Whether these first tokens of a branch are all that it can have."""
        tags = self._tags
        if len(branch) % 2 == 0:
            return branch != MAIN and tokens[-1] == tags.path_end
        if tags.summary_end is None:
            return len(tokens) == len(tags.joined)
        last = len(tokens) - 1 - len(tags.behind)
        return last >= 0 and tokens[last] == tags.summary_end

    def _paths(self, block: Branch) -> Iterator[Branch]:
        index = 0
        while (*block, index) in self._branches:
            yield (*block, index)
            index += 1

    def _blocks(self, branch: Branch) -> Iterator[Branch]:
        for number in range(1, len(self._branches[branch].texts)):
            yield (*branch, number)

    def _critical(self, branch: Branch) -> int:
        count = len(self._branches[branch].tokens)
        for block in self._blocks(branch):
            count += max((self._critical(path) for path in self._paths(block)), default=0)
            count += len(self._branches[block].tokens) if block in self._branches else 0
        return count

    def _chain(self, branch: Branch) -> dict[str, Any]:
        text = self._branches[branch]
        return {
            "texts": text.texts,
            "tokens": len(text.tokens),
            "closed": text.closed,
            "answer": stated_answer(" ".join(text.texts)),
            "blocks": [
                {"paths": [self._chain(path) for path in self._paths(block)], "summary": self._summary(block)}
                for block in self._blocks(branch)
            ],
        }

    def _summary(self, block: Branch) -> dict[str, Any] | None:
        if block not in self._branches or self._tags.summary_end is None:
            return None
        text = self._branches[block]
        return {"text": text.texts[0], "tokens": len(text.tokens), "closed": text.closed}
