"""Log-probs, entropies and barred tokens against log_softmax."""

from __future__ import annotations

import torch

from megatron_parallel_r1.train.logprobs import bar, entropies, target_logprobs


def test_logprobs_and_their_gradient_equal_log_softmax() -> None:
    logits_NV = torch.randn(7, 11, requires_grad=True)
    labels_N = torch.randint(11, (7,))
    weights_N = torch.randn(7)
    ours = target_logprobs(logits_NV * 1.0, labels_N)
    (gradient,) = torch.autograd.grad((ours * weights_N).sum(), logits_NV)
    theirs = logits_NV.log_softmax(-1).gather(1, labels_N[:, None])[:, 0]
    (expected,) = torch.autograd.grad((theirs * weights_N).sum(), logits_NV)
    assert torch.allclose(ours, theirs, atol=1e-6) and torch.allclose(gradient, expected, atol=1e-6)


def test_entropies_equal_the_definition_in_any_chunk() -> None:
    logits_NV = torch.randn(9, 13) * 3
    logprobs_NV = logits_NV.log_softmax(-1)
    expected_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    for chunk in (1, 4, 100):
        assert torch.allclose(entropies(logits_NV, chunk), expected_N, atol=1e-5)


def test_a_barred_token_is_out_of_the_distribution_and_gets_no_gradient() -> None:
    logits_NV = torch.zeros(3, 4, requires_grad=True)
    barred = bar(logits_NV, torch.tensor([2, -1, 0]))
    logprobs_N = target_logprobs(barred * 1.0, torch.tensor([0, 0, 1]))
    assert torch.allclose(logprobs_N.exp(), torch.tensor([1 / 3, 1 / 4, 1 / 3]))
    assert torch.allclose(entropies(barred.detach()).exp(), torch.tensor([3.0, 4.0, 3.0]))
    logprobs_N.sum().backward()
    assert logits_NV.grad[0, 2] == 0 and logits_NV.grad[2, 0] == 0 and logits_NV.grad[1, 2] != 0
