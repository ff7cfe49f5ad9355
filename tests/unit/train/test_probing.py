from __future__ import annotations

import random

import torch

from megatron_parallel_r1.train.logprob_runner import causal_logprobs
from tests.unit.rollout.tiny import tiny_qwen3


def test_log_probs_of_texts_are_those_of_transformers(trainer_of) -> None:
    rng = random.Random(1)
    texts = [[rng.randrange(7, 40) for _ in range(length)] for length in (2, 31, 3, 60, 17)]
    found = causal_logprobs(trainer_of(seed=3), texts, capacity=64)
    model = tiny_qwen3(3)
    for text, logprobs in zip(texts, found, strict=True):
        with torch.no_grad():
            logits_LV = model(torch.tensor([text])).logits[0, :-1]
        expected_L = logits_LV.log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0]
        # float32 log-probs of the same model in two implementations.
        torch.testing.assert_close(torch.tensor(logprobs), expected_L, atol=2e-5, rtol=0)
