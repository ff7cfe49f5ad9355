"""The six tags as token ids, and the end of sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAG_TEXTS = ("<Parallel>", "</Parallel>", "<Path>", "</Path>", "<Summary>", "</Summary>")


@dataclass(frozen=True, slots=True)
class Tags:
    """Token ids of the tags, in the order of `TAG_TEXTS`, and of the end of sequence.

    Attributes:
        eos: ends a worked example, and may end a response.
        more_eos: further tokens that may end a response.
    """

    parallel: int
    parallel_end: int
    path: int
    path_end: int
    summary: int
    summary_end: int
    eos: int
    more_eos: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ids = (*self.ids, self.eos)
        if len(set(ids)) != len(ids) or min(ids) < 0:
            raise ValueError(f"the six tags and eos need seven different token ids, got {ids}")
        if both := set(self.ids) & set(self.more_eos):
            raise ValueError(f"token {min(both)} is a tag, and an eos_token_id of generation_config.json")

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of the six tags, in the order of `TAG_TEXTS`."""
        return (
            self.parallel,
            self.parallel_end,
            self.path,
            self.path_end,
            self.summary,
            self.summary_end,
        )

    @property
    def ends(self) -> frozenset[int]:
        """All tokens that end a response."""
        return frozenset({self.eos, *self.more_eos})

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int] = ()) -> Tags:
        """Reads the ids from a tokenizer that `thought.tokenizer.add_tags` has extended.

        Args:
            eos_ids: further tokens that end a response (`thought.tokenizer.eos_ids`).

        Raises:
            ValueError: a tag is not a single token, or the tokenizer has no eos.
        """
        vocabulary = tokenizer.get_vocab()
        missing = [text for text in TAG_TEXTS if text not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer has no token for {', '.join(missing)}")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos token")
        ids = [vocabulary[text] for text in TAG_TEXTS]
        written = [token for token in tokenizer.encode("".join(TAG_TEXTS)) if token in ids]
        if written != ids:
            raise ValueError("the tokenizer splits a tag, though it has a token for it")
        eos = tokenizer.eos_token_id
        parallel, parallel_end, path, path_end, summary, summary_end = ids
        more_eos = tuple(token for token in eos_ids if token != eos)
        return cls(parallel, parallel_end, path, path_end, summary, summary_end, eos, more_eos)
