"""Control of an SGLang server (0.5.23): `sglang/srt/entrypoints/http_server.py` has the endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.servers.client import Unreachable
from megatron_parallel_r1.sync.control import (
    HttpClient,
    MemoryPart,
    Rendezvous,
    RowScores,
    TokenRow,
    WeightsInfo,
)
from megatron_parallel_r1.sync.settings import InFlightPolicy, TransportKind


class SglangControl:
    """See `Control`.

    Args:
        url: base address.
        timeout_s: how long one answer may take.
        transport: by which it will be sent weights.
    """

    kinds: frozenset[TransportKind] = frozenset({"distributed", "tensor", "disk"})
    wants_head = False

    def __init__(self, url: str, timeout_s: float = 600.0, transport: TransportKind = "distributed") -> None:
        self._wire = HttpClient(url, timeout_s)
        self._transport: TransportKind = transport

    @property
    def url(self) -> str:
        return self._wire.url

    def facts(self) -> WeightsInfo:
        # The version in /server_info is that of the command line.
        now, told = (self._wire.get(path, quick=True) for path in ("/model_info", "/server_info"))
        try:
            version, tensor = str(now["weight_version"]), int(told["tp_size"])
            stages, copies, dtype = int(told["pp_size"]), int(told["dp_size"]), str(told["dtype"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.url}/server_info: no SGLang server answers like this ({error!r})"
            ) from None
        if stages > 1:
            raise UserError(
                f"{self.url}: a server cut in layers takes no weights of a trainer here; start it with "
                "pp-size 1, and a larger tp-size instead"
            )
        check_copies(self.url, copies, self._transport)
        return WeightsInfo(
            int(version) if version.isdecimal() else None, tensor, None if dtype == "auto" else dtype
        )

    def pause(self, in_flight: InFlightPolicy) -> None:
        """`finish`: SGLang has no such pause, but it opens a weight update only once all requests have ended;
        one that comes between that and the pause is retracted."""
        if in_flight == "finish":
            self.begin()
        self._wire.post("/pause_generation", {"mode": "abort" if in_flight == "abort" else "retract"})
        if in_flight == "finish":
            self.end()

    def continue_generation(self) -> None:
        self._wire.post("/continue_generation")

    def join(self, meeting: Rendezvous) -> None:
        self._wire.post(
            "/init_weights_update_group",
            {
                "master_address": meeting.address,
                "master_port": meeting.port,
                "rank_offset": meeting.first,
                "world_size": meeting.size,
                "group_name": meeting.name,
                "backend": meeting.backend,
            },
        )

    def leave(self, name: str) -> None:
        # It is refused where the server was started anew since.
        with suppress(UserError):
            self._wire.post("/destroy_weights_update_group", {"group_name": name}, quick=True)

    def begin(self) -> None:
        try:
            self._wire.post("/begin_weight_update", {"selector": "all"})
        except UserError as error:
            if "already open" not in str(error):
                raise
            self.end()
            self._wire.post("/begin_weight_update", {"selector": "all"})

    def take_broadcast(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], group: str, version: int | None
    ) -> None:
        what = {"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": group}
        self._wire.post("/update_weights_from_distributed", what | _named(version))

    def take_tensors(self, payloads: Sequence[str], version: int | None) -> None:
        what = {"serialized_named_tensors": list(payloads)}
        self._wire.post("/update_weights_from_tensor", what | _named(version))

    def end(self) -> None:
        self._wire.post("/end_weight_update")

    def load(self, folder: Path, version: int) -> None:
        self._wire.post("/update_weights_from_disk", {"model_path": str(folder)} | _named(version))

    def score(self, rows: Sequence[TokenRow]) -> list[RowScores]:
        told = self._wire.post(
            "/generate",
            {
                "input_ids": [list(row) for row in rows],
                "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
                "return_logprob": True,
                "logprob_start_len": 0,
            },
        )
        try:
            return [
                tuple(float(logprob) for logprob, *_ in one["meta_info"]["input_token_logprobs"][1:])
                for one in told
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise Unreachable(f"{self.url}/generate: an answer without log-probs ({error!r})") from None

    def release_memory(self) -> None:
        self._wire.post("/release_memory_occupation")

    def resume_memory(self, part: MemoryPart) -> None:
        # Captured graphs hold addresses of both; they come back with the cache, as the last.
        tags = ["weights"] if part == "weights" else ["kv_cache", "cuda_graph"]
        self._wire.post("/resume_memory_occupation", {"tags": tags})

    def close(self) -> None:
        self._wire.close()


def check_copies(url: str, copies: int, transport: TransportKind) -> None:
    """Whether a server takes weights by `transport`: one of several data-parallel copies has them from disk
    alone (assertions in SGLang's `managers/tokenizer_control_mixin.py`).

    Raises:
        UserError: it cannot.
    """
    if copies > 1 and transport != "disk":
        raise UserError(
            f"{url} has {copies} copies of the model, and SGLang takes weights by sync.transport {transport} "
            "in servers of one copy only; start more servers in place of --dp, or set it to disk"
        )


def _named(version: int | None) -> dict[str, str | bool]:
    """The last part of an update flushes the cache and names the version."""
    return (
        {"flush_cache": False} if version is None else {"flush_cache": True, "weight_version": str(version)}
    )
