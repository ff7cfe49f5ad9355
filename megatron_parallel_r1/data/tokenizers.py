"""Trains a byte-level BPE tokenizer on a run's own texts, and loads the tokenizer of a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.tags import TAG_TEXTS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
_TAG = re.compile("|".join(map(re.escape, TAG_TEXTS)))
_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer that encodes any text and decodes it exactly.

    Args:
        texts: texts that the model will read and write; tags are cut out of them, since
            `thought.tokenizer.add_tags` adds them later.
        vocab_size: the number of entries, with the 256 bytes and pad, bos, eos, without the tags; a small
            corpus may yield fewer.

    Raises:
        UserError: `vocab_size` is too small for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [PAD, BOS, EOS]
    least = _BYTES + len(special)
    if vocab_size < least:
        raise UserError(f"tokenizer: vocab is {vocab_size}; a byte-level tokenizer needs {least} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _TAG.split(text)), trainer)
    return as_hf(tokenizer)


def as_hf(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wraps a tokenizer that has `<pad>`, `<bos>`, `<eos>` and, where words can be unknown, `<unk>`.

    It adds nothing around a text. `AutoTokenizer` loads it from the folder that `save_pretrained` writes.
    """
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNK}
    vocabulary = tokenizer.get_vocab()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{name: text for name, text in special.items() if text in vocabulary},
    )


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face folder.

    Raises:
        UserError: the folder has none.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder}: no tokenizer here (tokenizer_config.json is missing); give its folder")
    return AutoTokenizer.from_pretrained(folder)
