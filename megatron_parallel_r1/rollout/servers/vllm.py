"""Client of a vLLM server (written against 0.32.0), by token ids.

How a server must be started, and why:
- `--enable-scale-out`: opens `/inference/v1/generate`. OpenAI's endpoints clip a logit bias at -100, where a
  suppressed token could still be drawn.
- `--logprobs-mode processed_logprobs`: otherwise log-probs leave out bias and temperature
  (v1/sample/sampler.py). With it they are taken after top-k and top-p, unlike `Completion`: the client
  refuses such a request.
- `--enable-prompt-tokens-details`: reports how many tokens were in the cache.
- `VLLM_SERVER_DEV_MODE=1`: allows weight updates, and reports their version.

vLLM draws from one generator per request, step by step. The client seeds it with the seed and the position
where the request begins, so that two continuations of one branch do not repeat each other's draws.
"""

from __future__ import annotations

import uuid
from typing import Any

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.engine import Completion
from megatron_parallel_r1.rollout.servers.client import (
    INITIAL_VERSION,
    NEUTRAL,
    STOCK_MODES,
    AsyncHttpClient,
    GenerateRequest,
    GenerateResult,
    ServerInfo,
    Timeouts,
    Unreachable,
    draws_by_seed,
    parse_version,
    token_versions,
)
from megatron_parallel_r1.utils.seeding import hash_seed

# What vLLM writes for a log-prob of -inf or a missing one.
NO_LOGPROB = -9999.0


class VllmClient(AsyncHttpClient):
    """Implements `Server`."""

    def __init__(self, url: str, timeouts: Timeouts | None = None, key: str | None = None) -> None:
        super().__init__(url, timeouts, key)
        self._in_flight: set[str] = set()

    async def info(self) -> ServerInfo:
        """Reads the server's information; the first call also draws a few tokens to check its log-probs.

        Raises:
            UserError: the server's log-probs are of another distribution.
        """
        models = await self.get("/v1/models")
        if self._seeded is None:
            self._seeded = await draws_by_seed(self)
        try:
            model = models["data"][0]
            return ServerInfo(
                model=model["root"],
                modes=STOCK_MODES,
                version=await self._version(),
                max_tokens=int(model["max_model_len"]),
                cache_tokens=None,
                seeded=self._seeded,
            )
        except (KeyError, IndexError, TypeError) as error:
            raise Unreachable(f"{self.url}/v1/models: no vLLM server answers so: {error!r}") from error

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        sampling = request.sampling
        if sampling.temperature and (sampling.top_k or sampling.top_p < 1):
            raise UserError(
                f"{self.url}: vLLM's log-probs are taken after top-k and top-p, and training cannot compare "
                "them with its own; set top_k to 0 and top_p to 1, or roll out with SGLang"
            )
        if request.joined:
            raise UserError(f"{self.url}: vLLM has no mode isolated; use replay, or SGLang with the plugin")
        name = uuid.uuid4().hex
        self._in_flight.add(name)
        try:
            answer = await self.post("/inference/v1/generate", _body(request, name))
        finally:
            self._in_flight.discard(name)
        return self._read(answer, request)

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        params = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        body = {"token_ids": tokens, "sampling_params": params}
        answer = await self.post("/inference/v1/generate", body)
        try:
            scored = zip(answer["prompt_logprobs"][1:], tokens[1:], strict=True)
            return tuple(float(logprobs[str(token)]["logprob"]) for logprobs, token in scored)
        except (KeyError, TypeError, ValueError) as error:
            raise Unreachable(f"{self.url}: no log-probs of the prompt: {error!r}") from error

    async def abort_all(self) -> None:
        """Aborts this client's requests; in its usual mode vLLM cannot abort those of others."""
        names = [f"generate-tokens-{name}" for name in self._in_flight]
        await self.command("/inference/v1/abort_requests", {"request_ids": names})

    async def _version(self) -> int:
        try:
            return parse_version((await self.get("/weight_info"))["weight_version"])
        except UserError:
            return (
                INITIAL_VERSION  # Out of its development mode it does not say, and its weights do not change.
            )

    def _read(self, answer: Any, request: GenerateRequest) -> GenerateResult:
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
            if not (whole and 1 <= len(drawn) <= request.limit):
                raise Unreachable(f"{self.url}: tokens and log-probs of {len(drawn)} do not match")
            cached = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            versions = token_versions(choice.get("weight_versions"), len(drawn), INITIAL_VERSION)
        except (KeyError, TypeError, ValueError) as error:
            raise Unreachable(f"{self.url}/inference/v1/generate: an answer without {error!r}") from error
        stopped = drawn[-1] in request.stop
        if not stopped and len(drawn) < request.limit:
            raise Unreachable(f"{self.url}: cut at {len(drawn)} of {request.limit} tokens")
        return GenerateResult(Completion(tuple(drawn), tuple(logprobs), versions, stopped), cached)


def _body(request: GenerateRequest, name: str) -> dict[str, Any]:
    params: dict[str, Any] = {
        **NEUTRAL,
        "max_tokens": request.limit,
        "temperature": request.sampling.temperature,
        "seed": hash_seed(repr((request.sampling.seed, len(request.tokens)))),
        "stop_token_ids": sorted(request.stop),
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
        **request.logit_bias(),
    }
    return {"request_id": name, "token_ids": request.tokens, "sampling_params": params}
