"""The native engine decodes every family: log-probs of sampled tokens are those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.settings import Thinking
from tests.reference.traces import TAGS
from tests.unit.model.family_models import VARIANTS, family_model
from tests.unit.rollout.test_exactness import TOLERANCE, largest_difference
from tests.unit.rollout.tiny import random_prompts, traces_of


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "qwen3"])
def test_logprobs_equal_a_recomputation(variant: str, tmp_path: Path) -> None:
    # float32 logits of this size and no larger, as TOLERANCE is meant for
    model = family_model(variant, initializer_range=0.05)
    with torch.no_grad():
        for tag in (TAGS.parallel, TAGS.path_end, TAGS.summary_end):
            # So that blocks open and end: a logit is the head's row times a hidden state of mean 0 or so.
            model.get_output_embeddings().weight[tag] *= 4
    model.save_pretrained(tmp_path)
    shape, tensors = load_hf_folder(tmp_path)
    engine = NativeEngine(shape)
    engine.load_weights(tensors, version=0)
    thinking = Thinking(mode="isolated", paths=3, max_path_tokens=12, max_response_tokens=90)
    traces = traces_of(engine, thinking, random_prompts(20))
    assert sum(len(trace.tree.blocks) for trace in traces) >= 2
    assert largest_difference(model, traces, "isolated") <= TOLERANCE
