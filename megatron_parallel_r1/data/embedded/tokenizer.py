"""The curriculum's tokenizer: one token a word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_parallel_r1.data.embedded.congruence import vocabulary
from megatron_parallel_r1.data.hf_tokenizer import BOS, EOS, PAD, UNK, as_hf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that splits at white space alone; the tags are not in it yet.

    `thought.tokenizer.add_tags` adds those. Decoding joins the words with blanks; `data.canonical` then
    gives back a trace's text.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = [PAD, BOS, EOS, UNK, *vocabulary()]
    tokenizer = Tokenizer(WordLevel({word: id for id, word in enumerate(words)}, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return as_hf(tokenizer)
