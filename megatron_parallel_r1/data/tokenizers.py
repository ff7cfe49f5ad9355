"""Trains a byte-level BPE tokenizer on a run's own texts; loads the tokenizer of a folder and tries it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_parallel_r1.errors import UserError, one_line
from megatron_parallel_r1.thought.format_settings import stored_format
from megatron_parallel_r1.thought.formats import PARALLEL_R1, ThinkingFormat
from megatron_parallel_r1.thought.tags import TAG_TEXTS, Tags
from megatron_parallel_r1.thought.tokenizer import eos_ids
from megatron_parallel_r1.utils.hub import is_hub_name, missing_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from megatron_parallel_r1.thought.layout import Mode

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
_BYTES = 256
# Whitespace is not compared: some tokenizers add or tidy it.
_SAMPLE = "Step 1: 3 + 4 = 7, so x^2 = 49.\nFinal Answer: \\boxed{49}"
_CONFIG = "tokenizer_config.json"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, format: ThinkingFormat = PARALLEL_R1
) -> PreTrainedTokenizerFast:
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
    tokenizer.train_from_iterator((piece for text in texts for piece in format.split_out(text)), trainer)
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
    """Loads the tokenizer of a Hugging Face folder and tries it.

    Raises:
        UserError: the folder has none, or it does not work: `check_tokenizer`.
    """
    from transformers import AutoTokenizer

    if not (folder / _CONFIG).is_file():
        hint = missing_folder(folder) if is_hub_name(folder) else "give its folder"
        raise UserError(f"{folder}: no tokenizer here ({_CONFIG} is missing); {hint}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of transformers, tokenizers (a bare Exception), sentencepiece, json
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: the tokenizer needs Python code of its own (auto_map in {_CONFIG}), "
                "which is never run; save it as a tokenizer.json"
            ) from None
        raise UserError(
            f"{folder}: the tokenizer cannot be loaded ({one_line(error)}); copy its files again"
        ) from None
    check_tokenizer(tokenizer, folder)
    return tokenizer


def open_thinking_tokenizer(folder: Path, mode: Mode | None = None) -> tuple[PreTrainedTokenizerBase, Tags]:
    """Loads the tokenizer of a model that was trained to think in parallel, and its tags.

    Args:
        mode: that it will decode in; in `sequential` a model may have no tags.

    Raises:
        UserError: as `open_tokenizer`; or a tag or EOS is missing.
    """
    tokenizer, format = open_tokenizer(folder), stored_format(folder / "thinking.json")
    if mode == "sequential" and tokenizer.eos_token_id is not None:
        vocabulary = tokenizer.get_vocab()
        if not any(text in vocabulary for text in format.tags):
            return tokenizer, Tags.absent(tokenizer.eos_token_id, eos_ids(folder))
    try:
        return tokenizer, Tags.of(tokenizer, eos_ids(folder), format)
    except ValueError as error:
        raise UserError(
            f"{folder}: {error}; give a model that was trained to think in parallel, or mode sequential"
        ) from None


def check_companion_tokenizer(folder: Path) -> None:
    """Tries the tokenizer and the generation settings of a folder that may have none.

    Raises:
        UserError: they do not work.
    """
    if (folder / _CONFIG).is_file():
        open_tokenizer(folder)
    eos_ids(folder)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, where: Path) -> None:
    """Tries a tokenizer: a text must come back, and a chat template must show the message.

    Raises:
        UserError: it does not work; names `where`.
    """
    try:
        fault = _round_trip_fault(tokenizer)
    except Exception as error:
        fault = f"fails on a text ({one_line(error)})"
    if fault:
        raise UserError(f"{where}: the tokenizer {fault}; copy tokenizer.json and its other files again")
    if tokenizer.chat_template is None:
        return
    question = "What is 17 * 3?"
    try:
        message = {"role": "user", "content": question}
        shown = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever a template raises, or jinja2 about its syntax
        fault = f"fails on a user's message ({one_line(error)})"
    else:
        fault = None if question in str(shown) else "does not show the user's message"
    if fault:
        raise UserError(
            f"{where}: the chat template {fault}; correct chat_template.jinja or tokenizer_config.json"
        )


def _round_trip_fault(tokenizer: PreTrainedTokenizerBase) -> str | None:
    tokens = tokenizer.encode(_SAMPLE, add_special_tokens=False)
    text, unknown = _SAMPLE, tokenizer.unk_token_id
    if unknown is not None and unknown in tokens:
        # A vocabulary of few words: they must do.
        words = {token: word for word, token in tokenizer.get_vocab().items() if word not in TAG_TEXTS}
        own = sorted(words.keys() - set(tokenizer.all_special_ids))
        text = str(tokenizer.decode(own[:16]))
        tokens = tokenizer.encode(text, add_special_tokens=False)
    if not text.strip() or not tokens or all(token == unknown for token in tokens):
        return "encodes a text to nothing"
    back = str(tokenizer.decode(tokens))
    if unknown not in tokens and "".join(back.split()) != "".join(text.split()):
        return f"changes a text: {text!r} comes back as {back!r}"
    return None
