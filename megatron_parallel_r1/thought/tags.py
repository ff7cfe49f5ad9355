"""The tags and forced texts of a thinking format as token ids, and the end of sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_parallel_r1.thought.formats import MAX_PATHS, PARALLEL_R1, ThinkingFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAG_TEXTS = PARALLEL_R1.tags
_COUNTS = {6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten", 11: "eleven"}


@dataclass(frozen=True, slots=True)
class Tags:
    """Token ids of a format's tags (None: the format has no such tag), and of the end of sequence.

    Attributes:
        eos: ends a worked example, and may end a response.
        more_eos: further tokens that may end a response.
        known: whether the model has the tags; False: `absent`.
        texts: the token ids of the pieces of forced texts that are no tags.
    """

    parallel: int
    parallel_end: int | None
    path: int
    path_end: int
    summary: int | None
    summary_end: int | None
    eos: int
    more_eos: tuple[int, ...] = ()
    known: bool = True
    plan_begin: int | None = None
    item: int | None = None
    item_end: int | None = None
    plan_end: int | None = None
    texts: tuple[tuple[str, tuple[int, ...]], ...] = ()
    format: ThinkingFormat = PARALLEL_R1

    def __post_init__(self) -> None:
        ids = (*self.ids, self.eos)
        if len(set(ids)) != len(ids) or min(ids) < 0:
            count = f"the {_COUNTS[len(ids) - 1]} tags and eos need {_COUNTS[len(ids)]}"
            raise ValueError(f"{count} different token ids, got {ids}")
        if both := set(self.ids) & set(self.more_eos):
            raise ValueError(f"token {min(both)} is a tag, and an eos_token_id of generation_config.json")

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of all tags, in the order of the format's `tags`."""
        return tuple(getattr(self, role) for role in self.format.roles)

    @property
    def ends(self) -> frozenset[int]:
        """All tokens that end a response."""
        return frozenset({self.eos, *self.more_eos})

    @property
    def joined(self) -> tuple[int, ...]:
        """The tokens forced behind the last path."""
        return self._encode(self.format.joined)

    @property
    def behind(self) -> tuple[int, ...]:
        """The tokens forced behind a summary."""
        return self._encode(self.format.behind)

    def path_begin(self, number: int) -> tuple[int, ...]:
        """The tokens forced at the begin of path `number`, from 1 to `MAX_PATHS`."""
        return self._encode(self.format.begin_of(min(number, MAX_PATHS)))

    def _encode(self, text: str) -> tuple[int, ...]:
        """Encodes a forced text."""
        known = dict(self.texts) | {tag: (id,) for tag, id in zip(self.format.tags, self.ids, strict=True)}
        return tuple(token for piece in self.format.split(text) for token in known[piece])

    @classmethod
    def absent(cls, eos: int, more_eos: Sequence[int] = ()) -> Tags:
        """Stand-ins for a model without tags, which writes in `sequential` mode: no token has their ids."""
        n = 2**31
        more = tuple(token for token in more_eos if token != eos)
        return cls(n, n + 1, n + 2, n + 3, n + 4, n + 5, eos, more, known=False)

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int] = (),
        format: ThinkingFormat = PARALLEL_R1,
    ) -> Tags:
        """Reads the ids from a tokenizer that `thought.tokenizer.add_tags` has extended.

        Args:
            eos_ids: further tokens that end a response (`thought.tokenizer.eos_ids`).

        Raises:
            ValueError: a tag is not a single token, a forced text has unknown words, or the tokenizer has no
                eos.
        """
        vocabulary = tokenizer.get_vocab()
        missing = [text for text in format.tags if text not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer has no token for {', '.join(missing)}")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos token")
        ids = [vocabulary[text] for text in format.tags]
        written = [token for token in tokenizer.encode("".join(format.tags)) if token in ids]
        if written != ids:
            raise ValueError("the tokenizer splits a tag, though it has a token for it")
        texts = {piece: _plain(tokenizer, piece, ids) for piece in format.plain_pieces()}
        eos = tokenizer.eos_token_id
        more_eos = tuple(token for token in eos_ids if token != eos)
        return cls.from_ids(format, ids, eos, more_eos, tuple(texts.items()))

    @classmethod
    def from_ids(
        cls,
        format: ThinkingFormat,
        ids: Sequence[int],
        eos: int,
        more_eos: tuple[int, ...] = (),
        texts: tuple[tuple[str, tuple[int, ...]], ...] = (),
    ) -> Tags:
        """Names the ids of a format's tags, which are in the order of its `tags`, by their roles."""
        role = dict(zip(format.roles, ids, strict=True))
        return cls(
            parallel=role["parallel"],
            parallel_end=role.get("parallel_end"),
            path=role["path"],
            path_end=role["path_end"],
            summary=role.get("summary"),
            summary_end=role.get("summary_end"),
            eos=eos,
            more_eos=more_eos,
            plan_begin=role.get("plan_begin"),
            item=role.get("item"),
            item_end=role.get("item_end"),
            plan_end=role.get("plan_end"),
            texts=texts,
            format=format,
        )


def _plain(tokenizer: PreTrainedTokenizerBase, piece: str, tags: Sequence[int]) -> tuple[int, ...]:
    """Encodes a piece of a forced text; a tokenizer of words may drop white space."""
    tokens = tuple(tokenizer.encode(piece, add_special_tokens=False))
    if tokenizer.unk_token_id in tokens or set(tokens) & set(tags) or (piece.strip() and not tokens):
        raise ValueError(f"the tokenizer has no tokens for {piece!r}, which the format forces")
    return tokens
