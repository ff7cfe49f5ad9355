"""Fake colocated SGLang servers in this process: they compute with the weights that they were handed,
own memory as SGLang does, and die where a test says.

Both sides of a server are here: its control endpoints (`sync.control`) and its client (`rollout.servers`).
"""

from __future__ import annotations

import base64
import pickle
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
from megatron_parallel_r1.curriculum import start_checks
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import load_hf_tensors
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.servers import engine as server_engine
from megatron_parallel_r1.rollout.servers.client import (
    INITIAL_VERSION,
    STOCK_MODES,
    GenerateRequest,
    GenerateResult,
    ServerInfo,
    Unreachable,
)
from megatron_parallel_r1.run import backends
from megatron_parallel_r1.run.own_servers import OwnServers
from megatron_parallel_r1.sync.control import RowScores, TokenRow, WeightsInfo
from megatron_parallel_r1.train.logprob_runner import LogprobRunner, causal_logprobs
from megatron_parallel_r1.train.offload import TrainerMemory

ALL = frozenset({"weights", "kv_cache"})
# Megatron builds no two models at once.
ONE_AT_A_TIME = threading.Lock()


class FakeColocatedServer:
    """See the module.

    Attributes:
        calls: what trainer and servers did, in order; shared by all.
        dies_at: the call at which it dies, or what `strike` does happens, after `skips` of them; "": never.
    """

    kinds = frozenset({"tensor"})
    wants_head = False

    def __init__(self, url: str, folder: Path, fakes: Fakes, dies_at: str) -> None:
        self.url, self.calls, self.dies_at, self.skips = url, fakes.calls, dies_at, fakes.skips
        self._folder, self._strike = folder, fakes.strike
        self.start()

    def start(self) -> None:
        """As a new process: with the checkpoint's weights, and all memory."""
        self.alive, self.paused, self.version = True, False, None
        self.memory = set(ALL)
        self._shape, tensors = load_hf_folder(self._folder)
        self._tensors = dict(tensors)
        self._engine: NativeEngine | None = None

    def info(self) -> WeightsInfo:
        self._called("info")
        return WeightsInfo(self.version, 1, "float32")

    def pause(self, in_flight: str) -> None:
        self._called("pause", "weights")
        self.paused = True

    def continue_generation(self) -> None:
        self._called("continue", *ALL)
        self.paused = False

    def begin_update(self) -> None:
        self._called("begin", "weights")

    def receive_shared(self, payloads: Sequence[str], version: int | None) -> None:
        self._called("receive", "weights")
        for name, tensor in pickle.loads(base64.b64decode(payloads[0])):
            self._tensors[name] = tensor.clone()
        self.version, self._engine = version if version is not None else self.version, None

    def end_update(self) -> None:
        self._called("end", "weights")

    def score(self, rows: Sequence[TokenRow]) -> list[RowScores]:
        self._called("score", *ALL)
        with ONE_AT_A_TIME:
            model = build_model(self._shape)
            load_hf_tensors(model, self._tensors.items())
            return list(causal_logprobs(LogprobRunner(model), rows, 512))

    def release_memory(self) -> None:
        self._called("release", *ALL)
        assert self.paused
        self.memory.clear()
        self._tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in self._tensors.items()}

    def resume_memory(self, part: str) -> None:
        self._called(part)
        if part in self.memory:  # as SGLang, whose scheduler ends with a KeyError
            self.alive = False
            raise Unreachable(f"{self.url}: it was asked to resume {part}, which it has")
        self.memory.add(part)

    def _called(self, what: str, *needs: str) -> None:
        self.calls.append(what)
        if what == self.dies_at:
            self.skips -= 1
            if self.skips < 0:
                self.dies_at, self.alive = "", self._strike is not None
                if self._strike is not None:
                    self._strike()
        if not self.alive:
            raise Unreachable(f"{self.url} is gone")
        assert self.memory.issuperset(needs), f"{what} touches memory that was released"

    def close(self) -> None: ...


class FakeClient:
    """The client of a fake server."""

    def __init__(self, server: FakeColocatedServer) -> None:
        self.server, self.url = server, server.url

    async def info(self) -> ServerInfo:
        if not self.server.alive:
            raise Unreachable(f"{self.url} is gone")
        version = INITIAL_VERSION if self.server.version is None else self.server.version
        return ServerInfo("m", STOCK_MODES, version, 10_000, None)

    async def healthy(self) -> bool:
        return self.server.alive

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        server = self.server
        server._called("draw", *ALL)
        assert not server.paused
        if server._engine is None:
            server._engine = NativeEngine(server._shape)
            server._engine.load_weights(server._tensors.items(), server.version or 0)
        context = server._engine.open()
        await server._engine.write(context, request.tokens)
        drawn = await server._engine.sample(
            context, request.sampling, request.limit, request.stop, request.suppress
        )
        server._engine.close(context)
        return GenerateResult(drawn, 0)

    async def close(self) -> None: ...


class Fakes:
    """What stands in for the servers that a run starts: `dies_at` and `skips` are those of the last one.

    Attributes:
        calls: of all servers, and `offload` and `onload` of the trainer.
        restarts: whether a dead server is back when the supervisor may restart it.
    """

    def __init__(
        self,
        count: int,
        dies_at: str = "",
        skips: int = 0,
        restarts: bool = False,
        strike: Callable[[], None] | None = None,
    ) -> None:
        self.calls: list[str] = []
        self.servers: dict[str, FakeColocatedServer] = {}
        self.skips, self.strike = skips, strike
        self._count, self._dies_at, self.restarts = count, dies_at, restarts

    def install(self, patch: pytest.MonkeyPatch) -> None:
        def urls(own: OwnServers, folder: Path, isolated: bool) -> tuple[str, ...]:
            for number in range(self._count if not self.servers else 0):
                url = f"http://fake:{number}"
                dies_at = self._dies_at if number == self._count - 1 else ""
                self.servers[url] = FakeColocatedServer(url, folder, self, dies_at)
            return tuple(self.servers)

        def wake(own: OwnServers, patience_s: float) -> None:
            for server in self.servers.values():
                if self.restarts and not server.alive:
                    server.start()

        for name in ("offload", "onload"):
            patch.setattr(TrainerMemory, name, self._noted(name, getattr(TrainerMemory, name)))
        patch.setattr(OwnServers, "urls", urls)
        patch.setattr(OwnServers, "wake", wake)
        patch.setattr(backends, "_control", lambda rollout, url: self.servers[url])
        clients = {"sglang": lambda url, timeouts, key: FakeClient(self.servers[url])}
        patch.setattr(server_engine, "CLIENTS", clients)
        patch.setattr(start_checks, "check_launch", lambda settings: None)

    def _noted(self, name: str, real):
        def call(memory: TrainerMemory) -> None:
            if memory._is_offloaded == (name == "onload"):
                self.calls.append(name)
            real(memory)

        return call
