from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.sync.probe import ServerScores, TrainerScores, passes
from megatron_parallel_r1.train.logprob_runner import LogprobRunner, causal_logprobs, probe_texts
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


DEEP = ModelConfig(64, 36, 4, 2, 16, 96, 500, rope_theta=1e4, tied=False, max_positions=1024)
UP = "model.layers.17.mlp.up_proj.weight"


def drawn(std: float = 0.2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of DEEP; log-probs down to -60, logits of a trained model's size."""
    weights = dict(random_hf_tensors(DEEP, seed, std))
    return weights | {"lm_head.weight": weights["lm_head.weight"] * 6}


def scored(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> list[tuple[float, ...]]:
    """Log-probs of the probe's rows by `transformers`, row by row."""
    fields = DEEP.to_hf()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    model.load_state_dict(weights)
    model.to(dtype).eval()
    found = []
    with torch.no_grad():
        for row in probe_texts(DEEP.vocab, 2):
            logprobs_LV = model(torch.tensor([row])).logits[0, :-1].float().log_softmax(-1)
            found.append(tuple(logprobs_LV.gather(1, torch.tensor(row[1:])[:, None])[:, 0].tolist()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_deep_model_passes_the_probe_and_a_wrong_matrix_does_not(dtype: torch.dtype) -> None:
    name, weights = str(dtype).removeprefix("torch."), drawn()
    model = build_model(DEEP, dtype)
    load_hf_tensors(model, weights.items())
    found = causal_logprobs(LogprobRunner(model), probe_texts(DEEP.vocab, 2), capacity=256)
    trained = TrainerScores(found, None, None, name, DEEP.layers)
    sound = ServerScores("http://a:1", scored(weights, dtype), None, name)
    assert passes(sound, trained, None)
    if dtype is torch.bfloat16:
        # Far beyond the limit of float32, and the mean is what tells a redrawn matrix.
        assert not passes(sound, trained, 2e-5)
        wrong = drawn(seed=1)[UP]
    else:
        noise = torch.randn(weights[UP].shape, generator=torch.Generator().manual_seed(9))
        wrong = weights[UP] * (1 + 1e-3 * noise)
    assert not passes(replace(sound, scores=scored(weights | {UP: wrong}, dtype)), trained, None)
