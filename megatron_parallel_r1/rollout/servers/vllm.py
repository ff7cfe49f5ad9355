"""A client of one vLLM server (written against 0.32.0), which takes and gives token ids.

How a server must be started, and why:
- `--enable-scale-out`: opens `/inference/v1/generate`. OpenAI's endpoints cut a logit bias at -100, where a
  barred token could still be drawn.
- `--logprobs-mode processed_logprobs`: else log-probs leave out bias and temperature (v1/sample/sampler.py).
  With it they are those behind top-k and top-p, which `base.Completion` does not mean: such a request is
  refused.
- `--enable-prompt-tokens-details`, if it shall say how many tokens it had in its cache.
- `VLLM_SERVER_DEV_MODE=1`, if its weights are to change: without it nothing says their version.

vLLM draws from one generator a request, step by step. The client seeds it with the seed and the position
where the request begins, so that two continuations of one branch do not repeat each other's draws.
"""

from __future__ import annotations

import uuid
from typing import Any

import httpx

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.engine import Completion
from megatron_parallel_r1.rollout.servers.client import (
    STARTED,
    STOCK_MODES,
    About,
    Answered,
    Asked,
    Connection,
    Timeouts,
    Unreachable,
    version_of,
    versions_of,
)
from megatron_parallel_r1.rollout.servers.handshake import seeded
from megatron_parallel_r1.utils.seeding import hash_seed

# Added to a suppressed logit. It leaves a weight of exactly 0 in float32 at any temperature below 10^6.
BARRED = -1e9
# What vLLM writes for a log-prob of -inf, or one that is missing.
NO_LOGPROB = -9999.0


class VLLM:
    """Implements `server.Server`.

    Args:
        url: base address.
        transport: in the place of the network, for tests.
    """

    def __init__(
        self,
        url: str,
        timeouts: Timeouts | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = Connection(url, timeouts or Timeouts(), transport)
        self._seeded: bool | None = None
        self._under_way: set[str] = set()

    @property
    def url(self) -> str:
        return self._http.url

    async def about(self) -> About:
        """Asks, and the first time draws a little to see that log-probs are as promised.

        Raises:
            UserError: the server's log-probs are of another distribution.
        """
        models = await self._http.get("/v1/models")
        if self._seeded is None:
            self._seeded = await seeded(self)
        try:
            model = models["data"][0]
            return About(
                model=model["root"],
                modes=STOCK_MODES,
                version=await self._version(),
                max_tokens=int(model["max_model_len"]),
                cache_tokens=None,
                seeded=self._seeded,
            )
        except (KeyError, IndexError, TypeError) as error:
            raise Unreachable(f"{self.url}/v1/models is not what a vLLM server says: {error!r}") from error

    async def healthy(self) -> bool:
        return await self._http.answers("/health")

    async def generate(self, asked: Asked) -> Answered:
        sampling = asked.sampling
        if sampling.temperature and (sampling.top_k or sampling.top_p < 1):
            raise UserError(
                f"{self.url}: vLLM's log-probs are those behind top-k and top-p, which training cannot hold "
                "against its own; set top_k to 0 and top_p to 1, or roll out with SGLang"
            )
        if asked.joined:
            raise UserError(f"{self.url}: vLLM has no mode isolated; use replay, or SGLang with the plugin")
        name = uuid.uuid4().hex
        self._under_way.add(name)
        try:
            answer = await self._http.post("/inference/v1/generate", _body(asked, name))
        finally:
            self._under_way.discard(name)
        return self._read(answer, asked)

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        params = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        body = {"token_ids": tokens, "sampling_params": params}
        answer = await self._http.post("/inference/v1/generate", body)
        try:
            scored = zip(answer["prompt_logprobs"][1:], tokens[1:], strict=True)
            return tuple(float(logprobs[str(token)]["logprob"]) for logprobs, token in scored)
        except (KeyError, TypeError, ValueError) as error:
            raise Unreachable(f"{self.url}: no log-probs of the prompt: {error!r}") from error

    async def abort_all(self) -> None:
        """Ends what this client has under way; in its usual mode vLLM ends nobody else's."""
        names = [f"generate-tokens-{name}" for name in self._under_way]
        await self._http.command("/inference/v1/abort_requests", {"request_ids": names})

    async def close(self) -> None:
        await self._http.close()

    async def _version(self) -> int:
        try:
            return version_of((await self._http.get("/weight_info"))["weight_version"])
        except UserError:
            return STARTED  # Out of its development mode it does not say, and its weights do not change.

    def _read(self, answer: Any, asked: Asked) -> Answered:
        try:
            (choice,) = answer["choices"]
            drawn, content, reason = (
                choice["token_ids"],
                choice["logprobs"]["content"],
                choice["finish_reason"],
            )
            if reason not in ("stop", "length"):
                raise Unreachable(f"{self.url} ended a request with {reason!r}")
            logprobs = [float(entry["logprob"]) for entry in content]
            whole = [entry["token_id"] for entry in content] == drawn and min(logprobs) > NO_LOGPROB
            if not (whole and 1 <= len(drawn) <= asked.limit):
                raise Unreachable(f"{self.url}: tokens and log-probs of {len(drawn)} do not match")
            cached = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            versions = versions_of(choice.get("weight_versions"), len(drawn), STARTED)
        except (KeyError, TypeError, ValueError) as error:
            raise Unreachable(f"{self.url}/inference/v1/generate: an answer without {error!r}") from error
        stopped = drawn[-1] in asked.stop
        if not stopped and len(drawn) < asked.limit:
            raise Unreachable(f"{self.url}: cut at {len(drawn)} of {asked.limit} tokens")
        return Answered(Completion(tuple(drawn), tuple(logprobs), versions, stopped), cached)


def _body(asked: Asked, name: str) -> dict[str, Any]:
    params: dict[str, Any] = {
        "max_tokens": asked.limit,
        "temperature": asked.sampling.temperature,
        "seed": hash_seed(repr((asked.sampling.seed, len(asked.tokens)))),
        "stop_token_ids": sorted(asked.stop),
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }
    if asked.suppress:
        params["logit_bias"] = {str(token): BARRED for token in sorted(asked.suppress)}
    return {"request_id": name, "token_ids": asked.tokens, "sampling_params": params}
