"""Client of an SGLang server (written against 0.5.23), by token ids over `/generate`.

How a server must be started, and why:
- Log-probs: SGLang returns those of the distribution after logit bias and temperature, before top-k and top-p
  (srt/layers/sampler.py), as `Completion` requires. `SGLANG_RETURN_ORIGINAL_LOGPROB` changes that; the
  handshake refuses it.
- Seeds: with `--enable-deterministic-inference` it draws by `sampling_seed` and position; without it, it
  ignores seeds. `ServerInfo.seeded` says which.
- A temperature of 0 is its top-k of 1 at temperature 1.
- It also stops at its model's own end tokens. The client then continues the request from there.
- Experts: with `--enable-return-routed-experts` it keeps those of each cache slot, and so returns those of
  joined paths too.
"""

from __future__ import annotations

import math
from base64 import b64decode
from typing import Any

import numpy as np

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.engine import Completion
from megatron_parallel_r1.rollout.joined_blocks import FIELD, encode_blocks, supports_joined_blocks
from megatron_parallel_r1.rollout.servers.client import (
    NEUTRAL,
    STOCK_MODES,
    AsyncHttpClient,
    GenerateRequest,
    GenerateResult,
    ServerInfo,
    Unreachable,
    draws_by_seed,
    parse_version,
    token_versions,
)
from megatron_parallel_r1.thought.layout import Mode

ISOLATED: frozenset[Mode] = frozenset({"isolated"})


class SglangClient(AsyncHttpClient):
    """Implements `Server`."""

    async def info(self) -> ServerInfo:
        """Reads the server's information; the first call also draws a few tokens to check its log-probs.

        Raises:
            UserError: the server's log-probs are of another distribution.
        """
        server, model = await self.get("/server_info"), await self.get("/model_info")
        if self._seeded is None:
            self._seeded = await draws_by_seed(self)
        try:
            return ServerInfo(
                model=server["model_path"],
                modes=STOCK_MODES | ISOLATED if supports_joined_blocks(server) else STOCK_MODES,
                version=parse_version(model.get("weight_version")),
                max_tokens=_min_of(server, "context_length", "max_req_input_len", "max_total_num_tokens"),
                cache_tokens=server.get("max_total_num_tokens"),
                seeded=self._seeded,
                copies=server.get("dp_size", 1),
                nodes=server.get("nnodes", 1),
                nccl=_nccl(server),
                experts=bool(server.get("enable_return_routed_experts")),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise Unreachable(f"{self.url}/server_info: no SGLang server answers so: {error!r}") from error

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        tokens: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        cached = None
        while True:
            left = request.limit - len(tokens)
            answer = await self.post("/generate", _body(request, request.tokens + tuple(tokens), left))
            drawn, meta = self._read(answer, left)
            cached = meta.get("cached_tokens", 0) if cached is None else cached
            tokens += drawn
            logprobs += [float(logprob) for logprob, *_ in meta["output_token_logprobs"]]
            spans = meta.get("weight_versions")
            versions += token_versions(spans, len(drawn), parse_version(meta.get("weight_version")))
            stopped = tokens[-1] in request.stop
            if stopped or len(tokens) == request.limit:
                completion = Completion(tuple(tokens), tuple(logprobs), tuple(versions), stopped)
                return GenerateResult(completion, cached, self._experts(request, len(tokens), meta))

    def _experts(self, request: GenerateRequest, drawn: int, meta: dict[str, Any]) -> bytes:
        """`GenerateResult.experts`, from int32 in base64."""
        if request.experts_from is None:
            return b""
        if meta.get("routed_experts") is None:
            raise UserError(
                f"{self.url} returns no experts; start SGLang with --enable-return-routed-experts, which "
                "serve-rollout adds for a mixture of experts, or set objective.replay_experts to false"
            )
        chosen = np.frombuffer(b64decode(meta["routed_experts"]), "<i4")
        expected = len(request.tokens) + drawn - 1 - request.experts_from
        if not len(chosen) or len(chosen) % expected:
            raise Unreachable(f"{self.url}/generate: {len(chosen)} experts of {expected} tokens")
        return chosen.astype(np.int16).tobytes()

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        sampling = {"max_new_tokens": 0, "temperature": 1.0}
        body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}
        answer = await self.post("/generate", body | {"logprob_start_len": 0})
        try:
            scored = answer["meta_info"]["input_token_logprobs"]
            # The ids beside them are no check: SGLang writes 0 for the vocabulary's last.
            if len(scored) != len(tokens):
                raise ValueError(f"{len(scored)} for {len(tokens)} tokens")
            return tuple(float(logprob) for logprob, *_ in scored[1:])
        except (KeyError, TypeError, ValueError) as error:
            raise Unreachable(f"{self.url}/generate: no log-probs of the prompt: {error!r}") from error

    async def abort_all(self) -> None:
        await self.command("/abort_request", {"abort_all": True})

    def _read(self, answer: Any, left: int) -> tuple[list[int], dict[str, Any]]:
        """The drawn tokens, at least one, and their metadata."""
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


def _nccl(server_info: dict[str, Any]) -> tuple[int, ...] | None:
    """The version that a server with the plugin reports; stock SGLang reports none."""
    states = [state.get(FIELD, {}) for state in server_info.get("internal_states", [])]
    versions = [state["nccl"] for state in states if state.get("nccl")]
    return tuple(versions[0]) if versions else None


def _body(request: GenerateRequest, tokens: tuple[int, ...], left: int) -> dict[str, Any]:
    sampling = request.sampling
    params: dict[str, Any] = {
        "max_new_tokens": left,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        **NEUTRAL,
        "sampling_seed": sampling.seed,
        "stop_token_ids": sorted(request.stop),
        "skip_special_tokens": False,
        "no_stop_trim": True,
        **request.logit_bias(),
    }
    if request.joined:
        params["custom_params"] = {FIELD: encode_blocks(request.joined)}
    body = {"input_ids": tokens, "sampling_params": params, "return_logprob": True}
    if request.experts_from is not None:
        body |= {"return_routed_experts": True, "routed_experts_start_len": request.experts_from}
    return body


def _min_of(server: dict[str, Any], *names: str) -> int:
    return min(int(server[name]) for name in names if server.get(name) is not None)


def _is_logprob(entry: Any) -> bool:
    return isinstance(entry[0], (int, float)) and math.isfinite(entry[0])
