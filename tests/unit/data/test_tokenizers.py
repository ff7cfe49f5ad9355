"""Both tokenizers as Hugging Face tokenizers: saved, loaded by AutoTokenizer, tags in."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from megatron_parallel_r1.data.embedded.generate import build_tokenizer
from megatron_parallel_r1.data.tokenizers import train_tokenizer
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.tags import TAG_TEXTS, Tags
from megatron_parallel_r1.thought.tokenizer import add_tags

TRACE = "need=3 <Parallel><Path> x=6 ax=5 ax+b=10 s=8 no none </Path></Parallel><Summary> none </Summary>"
TEXTS = [
    f"Tom has {n} apples and buys {n + 1} more.\n<Parallel><Path>\nHe has {2 * n + 1}.\n</Path></Parallel>"
    for n in range(50)
]
BPE = train_tokenizer(TEXTS, vocab_size=400)
BPE_TAGS = add_tags(BPE)


@pytest.mark.parametrize("build", [build_tokenizer, lambda: train_tokenizer(TEXTS, vocab_size=400)])
@pytest.mark.parametrize("beside_a_model", [False, True])
def test_saved_and_loaded(build, beside_a_model: bool, tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = build()
    size = len(tokenizer)
    tags = add_tags(tokenizer)
    assert len(tokenizer) == size + 6
    tokenizer.save_pretrained(tmp_path)
    if beside_a_model:
        Qwen3Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert Tags.of(loaded) == tags
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token) == ("<pad>", "<bos>", "<eos>")
    for text in (TRACE, "Solve mod 13: 3x² +5x +4 =7", TEXTS[7]):
        ids = tokenizer.encode(text)
        assert loaded.encode(text) == ids
        assert loaded.decode(ids) == tokenizer.decode(ids)


def test_tags_are_single_tokens_that_decoding_shows() -> None:
    for tokenizer in (BPE, _embedded()):
        ids = tokenizer.encode("".join(TAG_TEXTS))
        assert tokenizer.convert_ids_to_tokens(ids) == list(TAG_TEXTS)
        assert all(tag in tokenizer.decode(ids, skip_special_tokens=True) for tag in TAG_TEXTS)


def test_unknown_words_are_unk() -> None:
    tokenizer = _embedded()
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("x=5 x=13")) == ["x=5", "<unk>"]


@given(st.text())
def test_bpe_encodes_any_text(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text


def test_bpe_learns_words_and_no_tags() -> None:
    learned = train_tokenizer(TEXTS, vocab_size=400).get_vocab()
    assert "Ġapples" in learned
    assert not any("Parallel" in piece or "Path" in piece for piece in learned)
    assert learned == train_tokenizer(TEXTS, vocab_size=400).get_vocab()
    assert len(learned) <= 400


def test_bpe_vocabulary_needs_room_for_bytes() -> None:
    with pytest.raises(UserError, match="259 or more"):
        train_tokenizer(TEXTS, vocab_size=258)


def _embedded() -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    add_tags(tokenizer)
    return tokenizer
