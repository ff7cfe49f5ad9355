"""The tags in a tokenizer and an embedding."""

from __future__ import annotations

import pytest
import torch

from megatron_parallel_r1.data.tokenizers import train_tokenizer
from megatron_parallel_r1.thought.tags import TAG_TEXTS, Tags
from megatron_parallel_r1.thought.tokenizer import add_tags, spread_new_embeddings


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
