"""Log-probs, entropies and suppressed tokens against log_softmax over all logits, in any chunk."""

from __future__ import annotations

import pytest
import torch

from megatron_parallel_r1.train.target_logprobs import LogprobQuery, target_logprobs
from tests.reference.peak import Peak

N, E, V = 9, 6, 13


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a head with two rows that are no tokens, labels and suppressed tokens."""
    generator = torch.Generator().manual_seed(seed)
    hidden_NE = torch.randn(N, E, generator=generator, dtype=torch.float32)
    head_VE = torch.randn(V + 2, E, generator=generator)
    labels_N = torch.randint(V, (N,), generator=generator)
    suppressed_N = torch.where(torch.arange(N) % 3 == 0, (labels_N + 1) % V, -1)
    return hidden_NE.requires_grad_(), head_VE.requires_grad_(), labels_N, suppressed_N


def reference(
    hidden_NE: torch.Tensor, head_VE: torch.Tensor, labels_N: torch.Tensor, suppressed_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_NV = (hidden_NE @ head_VE[:V].T) / 0.7
    is_suppressed_NV = torch.arange(V) == suppressed_N[:, None]
    logprobs_NV = logits_NV.masked_fill(is_suppressed_NV, -1e9).log_softmax(-1)
    terms_NV = (logprobs_NV.exp() * logprobs_NV).masked_fill(is_suppressed_NV, 0.0)
    return logprobs_NV.gather(1, labels_N[:, None])[:, 0], -terms_NV.sum(-1)


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_values_and_gradients_equal_the_definition(chunk: int | None) -> None:
    hidden_NE, head_VE, labels_N, suppressed_N = drawn(3)
    weights_2N = torch.randn(2, N, generator=torch.Generator().manual_seed(4))
    ours = target_logprobs(hidden_NE, head_VE, LogprobQuery(labels_N, suppressed_N, 0.7, V, chunk))
    theirs = reference(hidden_NE, head_VE, labels_N, suppressed_N)
    # Both outputs' gradients at once, and each alone: the other's is then None.
    for mask in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        gradients = []
        for values in (ours, theirs):
            used = [m * (w_N * v_N).sum() for m, w_N, v_N in zip(mask, weights_2N, values, strict=True) if m]
            gradients.append(torch.autograd.grad(sum(used), (hidden_NE, head_VE), retain_graph=True))
        for computed, expected in zip(*gradients, strict=True):
            assert (computed - expected).abs().max() <= 1e-5  # float32, values of order 1
    for mine_N, expected_N in zip(ours, theirs, strict=True):
        assert (mine_N - expected_N).abs().max() <= 1e-5


def test_a_suppressed_token_is_out_of_the_distribution() -> None:
    hidden_NE, head_VE = torch.zeros(3, 2), torch.zeros(4, 2, requires_grad=True)
    query = LogprobQuery(torch.tensor([0, 0, 1]), torch.tensor([2, -1, 0]), 1.0, vocab=4)
    logprobs_N, entropies_N = target_logprobs(hidden_NE + 1, head_VE, query)
    assert torch.allclose(logprobs_N.exp(), torch.tensor([1 / 3, 1 / 4, 1 / 3]))
    assert torch.allclose(entropies_N.exp(), torch.tensor([3.0, 4.0, 3.0]))


def test_no_targets_are_no_error_and_have_no_gradient() -> None:
    hidden_NE, head_VE = torch.zeros(0, 2, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    logprobs_N, _ = target_logprobs(hidden_NE, head_VE, LogprobQuery(nothing, nothing, 1.0, vocab=4))
    logprobs_N.sum().backward()
    assert logprobs_N.shape == (0,) and head_VE.grad.abs().sum() == 0


def test_peak_memory_does_not_grow_with_targets_times_vocabulary() -> None:
    """What autograd keeps between forward and backward is of the size of the inputs and of [N]."""
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    hidden_NE, head_VE = torch.randn(300, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    labels_N = torch.zeros(300, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        target_logprobs(hidden_NE, head_VE, LogprobQuery(labels_N, labels_N - 1, 1.0, 500, chunk=8))
    assert sum(kept) <= hidden_NE.numel() + head_VE.numel() + 2 * 300 < 300 * 500


@pytest.mark.parametrize("targets", [300, 1200])
def test_forward_and_backward_never_hold_more_logits_than_a_chunk_has(targets: int) -> None:
    vocabulary, hidden, chunk = 500, 4, 8
    hidden_NE = torch.randn(targets, hidden, requires_grad=True)
    head_VE = torch.randn(vocabulary, hidden, requires_grad=True)
    labels_N = torch.zeros(targets, dtype=torch.int64)
    with Peak() as peak:
        for known in (hidden_NE, head_VE, labels_N):
            peak.know(known)
        query = LogprobQuery(labels_N, labels_N - 1, 1.0, vocabulary, chunk)
        logprobs_N, entropies_N = target_logprobs(hidden_NE, head_VE, query)
        (logprobs_N.sum() + entropies_N.sum()).backward()
    # Gradients and their like of both inputs, a few vectors of the targets, a few blocks of a chunk's logits.
    allowed = 4 * (3 * (hidden_NE.numel() + head_VE.numel()) + 12 * targets + 8 * chunk * vocabulary)
    assert 4 * chunk * vocabulary < peak.peak <= allowed < 4 * targets * vocabulary, (peak.peak, allowed)
