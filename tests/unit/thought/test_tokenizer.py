"""The tags in a tokenizer and an embedding."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Punctuation
from transformers import PreTrainedTokenizerFast

from megatron_parallel_r1.data.embedded.generate import build_tokenizer
from megatron_parallel_r1.data.tokenizers import train_tokenizer
from megatron_parallel_r1.thought.tags import TAG_TEXTS, Tags
from megatron_parallel_r1.thought.tokenizer import add_tags, spread_new_embeddings, tag_subwords


def test_tags_are_single_tokens_that_decode_shows() -> None:
    tokenizer = train_tokenizer(["one plus one is two", "two views of it"], vocab_size=280)
    with pytest.raises(ValueError, match="no token for <Parallel>"):
        Tags.of(tokenizer)
    tags = add_tags(tokenizer)
    assert tags == Tags.of(tokenizer) == add_tags(tokenizer)
    text = "one<Parallel><Path>two</Path></Parallel><Summary> it</Summary>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    for tag in TAG_TEXTS:
        assert ids.count(tokenizer.convert_tokens_to_ids(tag)) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tags_need_seven_different_ids() -> None:
    with pytest.raises(ValueError, match="seven different"):
        Tags(1, 2, 3, 4, 5, 5, 7)


def test_new_embeddings_are_distinct_and_of_the_same_kind() -> None:
    # As in a released base model: unused rows, all alike.
    weight_VD = torch.cat([torch.randn(500, 64) * 0.3 + 1.0, torch.zeros(10, 64)])
    known_VD = weight_VD[:500].clone()
    spread_new_embeddings(weight_VD, range(500, 510), seed=1)
    assert torch.equal(weight_VD[:500], known_VD)
    fresh_ND = weight_VD[500:]
    distances = torch.pdist(fresh_ND)
    assert distances.min() > 0.1
    assert (fresh_ND.mean(1) - 1.0).abs().max() < 0.05
    again_VD = torch.cat([known_VD, torch.zeros(10, 64)])
    spread_new_embeddings(again_VD, range(500, 510), seed=1)
    assert torch.equal(again_VD, weight_VD)


def test_new_embeddings_start_from_the_subwords_of_the_tags() -> None:
    texts = ["</ Path > < Path > a Path b Summary </ Summary >"] * 9
    tokenizer = train_tokenizer(texts, vocab_size=300)
    plain = tokenizer.encode("</Summary>", add_special_tokens=False)
    tags = add_tags(tokenizer)
    subwords = tag_subwords(tokenizer)
    assert subwords[tags.summary_end] == plain and len(plain) < len("</Summary>")
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(len(tokenizer), 64, generator=generator)
    known_VD = weight_VD[: tags.parallel].clone()
    spread_new_embeddings(weight_VD, tags.ids, 1, {**subwords, tags.path: []})
    assert torch.equal(weight_VD[: tags.parallel], known_VD)
    for tag in tags.ids:
        expected_D = known_VD.mean(0) if tag == tags.path else known_VD[subwords[tag]].mean(0)
        gap_D = weight_VD[tag] - expected_D
        assert 0.05 < gap_D.std() < 0.2 and gap_D.abs().max() < 0.5


def test_words_that_the_tokenizer_does_not_know_are_no_subwords() -> None:
    tokenizer = build_tokenizer()
    tags = add_tags(tokenizer)
    assert all(tokenizer.unk_token_id not in tag_subwords(tokenizer)[tag] for tag in tags.ids)


def test_a_tag_that_the_tokenizer_splits_is_refused() -> None:
    vocabulary = {word: id for id, word in enumerate(["<eos>", "<unk>", *TAG_TEXTS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Punctuation()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    with pytest.raises(ValueError, match="splits a tag"):
        Tags.of(tokenizer)


def test_further_tokens_end_a_response() -> None:
    tags = Tags(1, 2, 3, 4, 5, 6, 7, (8, 9))
    assert tags.ends == {7, 8, 9} and tags.ids == (1, 2, 3, 4, 5, 6)
    with pytest.raises(ValueError, match="token 3 is a tag"):
        Tags(1, 2, 3, 4, 5, 6, 7, (8, 3))
