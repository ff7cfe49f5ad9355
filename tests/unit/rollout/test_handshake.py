"""The handshake knows by log-probs alone whether they are of the temperature, of any model in any dtype."""

from __future__ import annotations

import asyncio

import pytest
import torch

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.engine import Completion
from megatron_parallel_r1.rollout.servers.client import GenerateRequest, GenerateResult, draws_by_seed
from tests.unit.rollout.fake_servers import FakeServer

VOCABULARY = 500


class RoundingServer(FakeServer):
    """Each answer has its own rounding in bfloat16: of a chain of 36 layers, as far as logits show it.

    Args:
        spread: standard deviation of the logits.
        tempered: whether log-probs are those of the temperature.
    """

    def __init__(self, spread: float, tempered: bool, seed: int) -> None:
        super().__init__("http://a:1")
        self.random = torch.Generator().manual_seed(seed)
        self.logits_V = spread * torch.randn(VOCABULARY, generator=self.random)
        self.tempered = tempered

    def logprobs(self, temperature: float) -> torch.Tensor:
        noise_V = torch.randn(VOCABULARY, generator=self.random)
        # `utils.rounding`'s unit: the roundoff by the root of the terms, relative to what is rounded.
        rounded_V = self.logits_V * (1 + 2.0**-8 * noise_V * (2 * 36 + 2) ** 0.5 / 4)
        return (rounded_V.bfloat16().float() / temperature).log_softmax(-1)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        logprobs_V = self.logprobs(request.sampling.temperature)
        seeded = torch.Generator().manual_seed(request.sampling.seed)
        drawn = torch.multinomial(logprobs_V.exp(), request.limit, True, generator=seeded).tolist()
        said_V = logprobs_V if self.tempered else self.logprobs(1.0)
        found = tuple(float(said_V[token]) for token in drawn)
        return GenerateResult(Completion(tuple(drawn), found, (0,) * len(drawn), False), 0)

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        return tuple(float(self.logprobs(1.0)[token]) for token in tokens[1:])


@pytest.mark.parametrize("spread", [0.02, 0.5, 4.0])
def test_a_left_out_temperature_shows_through_the_rounding_of_bfloat16(spread: float) -> None:
    for seed in range(20):
        assert asyncio.run(draws_by_seed(RoundingServer(spread, True, seed))) in (True, False)
        with pytest.raises(UserError, match="leave the temperature out"):
            asyncio.run(draws_by_seed(RoundingServer(spread, False, seed)))
