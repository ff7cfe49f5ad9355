"""The six tags as token ids, and the end of sequence."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAG_TEXTS = ("<Parallel>", "</Parallel>", "<Path>", "</Path>", "<Summary>", "</Summary>")


@dataclass(frozen=True, slots=True)
class Tags:
    """Token ids of the tags, in the order of `TAG_TEXTS`, and of the end of sequence."""

    parallel: int
    parallel_end: int
    path: int
    path_end: int
    summary: int
    summary_end: int
    eos: int

    def __post_init__(self) -> None:
        ids = astuple(self)
        if len(set(ids)) != len(ids) or min(ids) < 0:
            raise ValueError(f"the six tags and eos need seven different token ids, got {ids}")

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Tags:
        """Reads the ids from a tokenizer that `thought.tokenizer.add_tags` has extended.

        Raises:
            ValueError: a tag is not a single token, or the tokenizer has no eos.
        """
        vocabulary = tokenizer.get_vocab()
        missing = [text for text in TAG_TEXTS if text not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer has no token for {', '.join(missing)}")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos token")
        ids = [*(vocabulary[text] for text in TAG_TEXTS), tokenizer.eos_token_id]
        return cls(*ids)
