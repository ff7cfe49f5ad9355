"""A client of one SGLang server (written against 0.5.23), which takes and gives token ids over `/generate`.

How a server must be started, and why:
- Log-probs: SGLang returns those of the distribution behind logit bias and temperature, before top-k and
  top-p (srt/layers/sampler.py): what `base.Completion` promises. `SGLANG_RETURN_ORIGINAL_LOGPROB` changes
  that; the handshake refuses it.
- Seeds: it draws by `sampling_seed` and position, if it was started with `--enable-deterministic-inference`,
  and ignores seeds without it. `About.seeded` says which.
- A temperature of 0 is its top-k of 1 at temperature 1.
- It stops at its model's own end tokens too. Such a continuation is asked on from there.
"""

from __future__ import annotations

import math
from typing import Any

import httpx

from megatron_parallel_r1.rollout.engine import Completion
from megatron_parallel_r1.rollout.joined_blocks import FIELD, encode, understood
from megatron_parallel_r1.rollout.servers.client import (
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
from megatron_parallel_r1.thought.layout import Mode

# Added to a suppressed logit. It leaves a weight of exactly 0 in float32 at any temperature below 10^6.
BARRED = -1e9
ISOLATED: frozenset[Mode] = frozenset({"isolated"})


class SGLang:
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

    @property
    def url(self) -> str:
        return self._http.url

    async def about(self) -> About:
        """Asks, and the first time draws a little to see that log-probs are as promised.

        Raises:
            UserError: the server's log-probs are of another distribution.
        """
        server, model = await self._http.get("/server_info"), await self._http.get("/model_info")
        if self._seeded is None:
            self._seeded = await seeded(self)
        try:
            return About(
                model=server["model_path"],
                modes=STOCK_MODES | ISOLATED if understood(server) else STOCK_MODES,
                version=version_of(model.get("weight_version")),
                max_tokens=_least(server, "context_length", "max_req_input_len", "max_total_num_tokens"),
                cache_tokens=server.get("max_total_num_tokens"),
                seeded=self._seeded,
                copies=server.get("dp_size", 1),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise Unreachable(
                f"{self.url}/server_info is not what an SGLang server says: {error!r}"
            ) from error

    async def healthy(self) -> bool:
        return await self._http.answers("/health")

    async def generate(self, asked: Asked) -> Answered:
        tokens, logprobs, versions = [], [], []
        cached = None
        while True:
            left = asked.limit - len(tokens)
            answer = await self._http.post("/generate", _body(asked, asked.tokens + tuple(tokens), left))
            drawn, meta = self._read(answer, left)
            cached = meta.get("cached_tokens", 0) if cached is None else cached
            tokens += drawn
            logprobs += [float(logprob) for logprob, *_ in meta["output_token_logprobs"]]
            spans = meta.get("weight_versions")
            versions += versions_of(spans, len(drawn), version_of(meta.get("weight_version")))
            stopped = tokens[-1] in asked.stop
            if stopped or len(tokens) == asked.limit:
                completion = Completion(tuple(tokens), tuple(logprobs), tuple(versions), stopped)
                return Answered(completion, cached)

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        sampling = {"max_new_tokens": 0, "temperature": 1.0}
        body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}
        answer = await self._http.post("/generate", body | {"logprob_start_len": 0})
        try:
            scored = answer["meta_info"]["input_token_logprobs"]
            # The ids beside them are no check: SGLang writes 0 for the vocabulary's last.
            if len(scored) != len(tokens):
                raise ValueError(f"{len(scored)} for {len(tokens)} tokens")
            return tuple(float(logprob) for logprob, *_ in scored[1:])
        except (KeyError, TypeError, ValueError) as error:
            raise Unreachable(f"{self.url}/generate: no log-probs of the prompt: {error!r}") from error

    async def abort_all(self) -> None:
        await self._http.command("/abort_request", {"abort_all": True})

    async def close(self) -> None:
        await self._http.close()

    def _read(self, answer: Any, left: int) -> tuple[list[int], dict[str, Any]]:
        """The drawn tokens, at least one, and what is told of them."""
        try:
            drawn, meta = answer["output_ids"], answer["meta_info"]
            reason = meta["finish_reason"]["type"]
            if reason == "abort":
                raise Unreachable(
                    f"{self.url} aborted: {meta['finish_reason'].get('message', 'no reason given')}"
                )
            whole = [token for _, token, *_ in meta["output_token_logprobs"]] == drawn
            if not (
                whole and 1 <= len(drawn) <= left and all(map(_is_logprob, meta["output_token_logprobs"]))
            ):
                raise Unreachable(f"{self.url}/generate: tokens and log-probs of {len(drawn)} do not match")
        except (KeyError, TypeError, ValueError) as error:
            raise Unreachable(f"{self.url}/generate: an answer without {error!r}") from error
        if reason == "length" and len(drawn) < left:
            raise Unreachable(f"{self.url}/generate: cut at {len(drawn)} of {left} tokens")
        return drawn, meta


def _body(asked: Asked, tokens: tuple[int, ...], left: int) -> dict[str, Any]:
    sampling = asked.sampling
    params: dict[str, Any] = {
        "max_new_tokens": left,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "sampling_seed": sampling.seed,
        "stop_token_ids": sorted(asked.stop),
        "skip_special_tokens": False,
        "no_stop_trim": True,
    }
    if asked.suppress:
        params["logit_bias"] = {str(token): BARRED for token in sorted(asked.suppress)}
    if asked.joined:
        params["custom_params"] = {FIELD: encode(asked.joined)}
    return {"input_ids": tokens, "sampling_params": params, "return_logprob": True}


def _least(server: dict[str, Any], *names: str) -> int:
    return min(int(server[name]) for name in names if server.get(name) is not None)


def _is_logprob(entry: Any) -> bool:
    return isinstance(entry[0], (int, float)) and math.isfinite(entry[0])
