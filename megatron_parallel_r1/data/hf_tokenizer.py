"""What the tokenizers that are built here have in common as Hugging Face tokenizers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"


def as_hf(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wraps a tokenizer that knows `<pad>`, `<bos>`, `<eos>` and, where words can be unknown, `<unk>`.

    It puts nothing around a text. `save_pretrained` writes it so that `AutoTokenizer` loads it.
    """
    from transformers import PreTrainedTokenizerFast

    named = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNK}
    known = tokenizer.get_vocab()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{name: text for name, text in named.items() if text in known},
    )
