"""Control of a vLLM server (0.32), started with VLLM_SERVER_DEV_MODE=1.

`vllm/entrypoints/rl/online/api_router.py` and `serve/dev/` have the endpoints. On a CPU vLLM multiplies by a
packed copy of the output matrix, and `reload_weights` packs it anew only if `lm_head.weight` is among the
tensors: with the embedding alone, as a tied model's folder has it, it goes on with the old one and says
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.servers.client import Unreachable
from megatron_parallel_r1.sync.control import HttpClient, MemoryPart, RowScores, TokenRow, WeightsInfo
from megatron_parallel_r1.sync.settings import InFlightPolicy, TransportKind

PAUSES: dict[InFlightPolicy, str] = {"finish": "wait", "retract": "keep", "abort": "abort"}


class VllmControl:
    """See `Control`.

    Args:
        url: base address.
        timeout_s: how long one answer may take.
    """

    kinds: frozenset[TransportKind] = frozenset({"disk"})
    wants_head = True

    def __init__(self, url: str, timeout_s: float = 600.0) -> None:
        self._wire = HttpClient(url, timeout_s)
        self._model = ""

    @property
    def url(self) -> str:
        return self._wire.url

    def facts(self) -> WeightsInfo:
        try:
            version = str(self._wire.get("/weight_info", quick=True)["weight_version"])
            processes = int(self._wire.get("/get_world_size", quick=True)["world_size"])
            # It looks into the whole environment first, which takes seconds.
            config = str(self._wire.get("/server_info")["vllm_config"])
        except UserError as error:
            raise UserError(f"{error}; start vLLM with VLLM_SERVER_DEV_MODE=1") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.url}: no vLLM server answers like this ({error!r})") from None
        dtype = re.search(r"\bdtype=torch\.(\w+)", config)
        return WeightsInfo(int(version) if version.isdecimal() else None, processes, dtype and dtype[1])

    def pause(self, in_flight: InFlightPolicy) -> None:
        self._wire.post(f"/pause?mode={PAUSES[in_flight]}")

    def continue_generation(self) -> None:
        self._wire.post("/resume")

    def load(self, folder: Path, version: int) -> None:
        self._wire.post(
            "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        )
        self._flush()
        self._wire.post("/update_weight_version", {"new_version": str(version)})

    def score(self, rows: Sequence[TokenRow]) -> list[RowScores]:
        # It draws one token at least.
        asked = {
            "prompt": [list(row) for row in rows],
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
        }
        told = self._wire.post("/v1/completions", {"model": self._name(), **asked})
        try:
            return [
                _read(choice["prompt_logprobs"], row)
                for choice, row in zip(told["choices"], rows, strict=True)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise Unreachable(f"{self.url}/v1/completions: an answer without log-probs ({error!r})") from None

    def release_memory(self) -> None:
        self._wire.post("/sleep?level=2")

    def resume_memory(self, part: MemoryPart) -> None:
        self._wire.post(f"/wake_up?tags={part}")

    def close(self) -> None:
        self._wire.close()

    def _flush(self) -> None:
        told = self._wire.post("/reset_prefix_cache?reset_running_requests=true")
        if not (isinstance(told, dict) and told.get("success")):
            raise Unreachable(f"{self.url}/reset_prefix_cache: the cache was not flushed ({told})")

    def _name(self) -> str:
        if not self._model:
            told = self._wire.get("/v1/models", quick=True)
            try:
                self._model = str(told["data"][0]["id"])
            except (KeyError, TypeError, IndexError):
                raise Unreachable(f"{self.url}/v1/models: no model ({told})") from None
        return self._model


def _read(positions: Sequence[Any], row: TokenRow) -> RowScores:
    """The log-probs that vLLM gives for each position by token id; the first has none."""
    following = zip(positions[1:], row[1:], strict=True)
    return tuple(float(position[str(token)]["logprob"]) for position, token in following)
