"""Controls a vLLM server (0.32), started with VLLM_SERVER_DEV_MODE=1.

Its endpoints are in `vllm/entrypoints/rl/online/api_router.py` and `serve/dev/`. On a CPU vLLM multiplies by
a packed copy of the output matrix, and `reload_weights` repacks it only if `lm_head.weight` is among the
tensors: with the embedding alone, as in a tied model's folder, it silently keeps the old one.
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


class VllmControl(HttpClient):
    """See `ServerControl`."""

    kinds: frozenset[TransportKind] = frozenset({"disk"})
    wants_head = True

    _model = ""

    def info(self) -> WeightsInfo:
        try:
            version = str(self.get("/weight_info", quick=True)["weight_version"])
            processes = int(self.get("/get_world_size", quick=True)["world_size"])
            # It inspects the whole environment first, which takes seconds.
            config = str(self.get("/server_info")["vllm_config"])
        except UserError as error:
            raise UserError(f"{error}; start vLLM with VLLM_SERVER_DEV_MODE=1") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.url}: no vLLM server answers like this ({error!r})") from None
        dtype = re.search(r"\bdtype=torch\.(\w+)", config)
        return WeightsInfo(int(version) if version.isdecimal() else None, processes, dtype and dtype[1])

    def pause(self, in_flight: InFlightPolicy) -> None:
        self.post(f"/pause?mode={PAUSES[in_flight]}")

    def continue_generation(self) -> None:
        self.post("/resume")

    def load_folder(self, folder: Path, version: int) -> None:
        self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        self._flush()
        self.post("/update_weight_version", {"new_version": str(version)})

    def score(self, rows: Sequence[TokenRow]) -> list[RowScores]:
        # It draws at least one token.
        request = {
            "prompt": [list(row) for row in rows],
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
        }
        answer = self.post("/v1/completions", {"model": self._name(), **request})
        try:
            return [
                _read(choice["prompt_logprobs"], row)
                for choice, row in zip(answer["choices"], rows, strict=True)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise Unreachable(f"{self.url}/v1/completions: an answer without log-probs ({error!r})") from None

    def release_memory(self) -> None:
        self.post("/sleep?level=2")

    def resume_memory(self, part: MemoryPart) -> None:
        self.post(f"/wake_up?tags={part}")

    def _flush(self) -> None:
        answer = self.post("/reset_prefix_cache?reset_running_requests=true")
        if not (isinstance(answer, dict) and answer.get("success")):
            raise Unreachable(f"{self.url}/reset_prefix_cache: the cache was not flushed ({answer})")

    def _name(self) -> str:
        if not self._model:
            answer = self.get("/v1/models", quick=True)
            try:
                self._model = str(answer["data"][0]["id"])
            except (KeyError, TypeError, IndexError):
                raise Unreachable(f"{self.url}/v1/models: no model ({answer})") from None
        return self._model


def _read(positions: Sequence[Any], row: TokenRow) -> RowScores:
    """Reads vLLM's log-probs, by token id for each position; the first has none."""
    following = zip(positions[1:], row[1:], strict=True)
    return tuple(float(position[str(token)]["logprob"]) for position, token in following)
