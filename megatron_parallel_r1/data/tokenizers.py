"""Trains a byte-level BPE tokenizer on a run's own texts, and loads the tokenizer of a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.tags import TAG_TEXTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_TAG = re.compile("|".join(map(re.escape, TAG_TEXTS)))
_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learns merges from `texts`; the result encodes any text, and decodes it back to the character.

    Args:
        texts: what the model will read and write; tags in them are cut out, `thought.tokenizer.add_tags`
            makes them tokens later.
        vocab_size: entries with the 256 bytes and pad, bos, eos, without the tags. Few texts may
            support fewer.

    Raises:
        UserError: `vocab_size` has no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [PAD, BOS, EOS]
    least = _BYTES + len(special)
    if vocab_size < least:
        raise UserError(f"tokenizer: vocab is {vocab_size}, a byte-level one needs {least} or more")
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


if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

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


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face folder.

    Raises:
        UserError: the folder has none.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder}: no tokenizer here (tokenizer_config.json is missing); give its folder")
    return AutoTokenizer.from_pretrained(folder)
