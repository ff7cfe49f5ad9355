"""Controls an SGLang server (0.5.23); its endpoints are in `sglang/srt/entrypoints/http_server.py`."""

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


class SglangControl(HttpClient):
    """See `ServerControl`; `transport` will bring its weights."""

    kinds: frozenset[TransportKind] = frozenset({"distributed", "tensor", "disk"})
    wants_head = False

    def __init__(
        self,
        url: str,
        timeout_s: float = 600.0,
        transport: TransportKind = "distributed",
        key: str | None = None,
    ) -> None:
        super().__init__(url, timeout_s, key)
        self._transport: TransportKind = transport

    def info(self) -> WeightsInfo:
        # /server_info has the command line's version.
        model, server = (self.get(path, quick=True) for path in ("/model_info", "/server_info"))
        try:
            version, tensor = str(model["weight_version"]), int(server["tp_size"])
            stages, copies, dtype = int(server["pp_size"]), int(server["dp_size"]), str(server["dtype"])
            nodes = int(server.get("nnodes") or 1)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.url}/server_info: no SGLang server answers like this ({error!r})"
            ) from None
        if stages > 1:
            raise UserError(
                f"{self.url}: a server with pipeline parallelism cannot take a trainer's weights; start "
                "it with pp-size 1 and a larger tp-size instead"
            )
        check_transport(self.url, copies, nodes, self._transport)
        return WeightsInfo(
            int(version) if version.isdecimal() else None, tensor, None if dtype == "auto" else dtype
        )

    def pause(self, in_flight: InFlightPolicy) -> None:
        """`finish`: SGLang has no such pause, but opens a weight update only once all requests have ended; a
        request that comes between that and the pause is retracted."""
        if in_flight == "finish":
            self.begin_update()
        self.post("/pause_generation", {"mode": "abort" if in_flight == "abort" else "retract"})
        if in_flight == "finish":
            self.end_update()

    def continue_generation(self) -> None:
        self.post("/continue_generation")

    def join_group(self, rendezvous: Rendezvous) -> None:
        self.post(
            "/init_weights_update_group",
            {
                "master_address": rendezvous.address,
                "master_port": rendezvous.port,
                "rank_offset": rendezvous.first,
                "world_size": rendezvous.size,
                "group_name": rendezvous.name,
                "backend": rendezvous.backend,
            },
        )

    def leave_group(self, name: str) -> None:
        # A server that was restarted refuses it.
        with suppress(UserError):
            self.post("/destroy_weights_update_group", {"group_name": name}, quick=True)

    def begin_update(self) -> None:
        try:
            self.post("/begin_weight_update", {"selector": "all"})
        except UserError as error:
            if "already open" not in str(error):
                raise
            self.end_update()
            self.post("/begin_weight_update", {"selector": "all"})

    def receive_broadcast(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], group: str, version: int | None
    ) -> None:
        body = {"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": group}
        body |= {"load_format": "flattened_bucket"}
        self.post("/update_weights_from_distributed", body | _version_fields(version))

    def receive_shared(self, payloads: Sequence[str], version: int | None) -> None:
        body = {"serialized_named_tensors": list(payloads)}
        self.post("/update_weights_from_tensor", body | _version_fields(version))

    def end_update(self) -> None:
        self.post("/end_weight_update")

    def load_folder(self, folder: Path, version: int) -> None:
        self.post("/update_weights_from_disk", {"model_path": str(folder)} | _version_fields(version))

    def score(self, rows: Sequence[TokenRow]) -> list[RowScores]:
        results = self.post(
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
                tuple(float(logprob) for logprob, *_ in result["meta_info"]["input_token_logprobs"][1:])
                for result in results
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise Unreachable(f"{self.url}/generate: an answer without log-probs ({error!r})") from None

    def release_memory(self) -> None:
        self.post("/release_memory_occupation")

    def resume_memory(self, part: MemoryPart) -> None:
        # Captured graphs hold addresses of both; they come back with the cache, last.
        tags = ["weights"] if part == "weights" else ["kv_cache", "cuda_graph"]
        self.post("/resume_memory_occupation", {"tags": tags})


def check_transport(url: str, copies: int, nodes: int, transport: TransportKind) -> None:
    """Checks that a server can take weights so.

    With several data-parallel copies it takes them only from disk (assertions in SGLang's
    `managers/tokenizer_control_mixin.py`), and over several nodes not from the memory of one.

    Raises:
        UserError: it cannot.
    """
    if nodes > 1 and transport == "tensor":
        raise UserError(
            f"{url} extends over {nodes} nodes, and sync.transport tensor shares memory within one; set it "
            "to distributed or disk"
        )
    if copies > 1 and transport != "disk":
        raise UserError(
            f"{url} has {copies} copies of the model, and SGLang takes weights by sync.transport {transport} "
            "only in servers of one copy; start more servers instead of --dp, or set it to disk"
        )


def _version_fields(version: int | None) -> dict[str, str | bool]:
    """The last bucket of an update flushes the cache and names the version."""
    return (
        {"flush_cache": False} if version is None else {"flush_cache": True, "weight_version": str(version)}
    )
