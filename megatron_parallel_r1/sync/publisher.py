"""Publishes a trainer's weights to rollout servers, and continues only if they compute with them.

A publication pauses the servers, sends all weights bucket by bucket, sets the new version, resumes the
servers, and compares their log-probs with the trainer's (the probe). All ranks of the trainer take part; rank
0 speaks to the servers, and its errors are raised on all ranks.

If trainer and servers share GPUs, call `release` before training, `resume` and `publish` after it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch

from megatron_parallel_r1.architecture.weight_table import EMBEDDING
from megatron_parallel_r1.distributed.collectives import run_on_rank_zero
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.model.weights import own_parameters
from megatron_parallel_r1.sync.broadcast import BroadcastTransport
from megatron_parallel_r1.sync.buckets import gather_buckets, is_sender
from megatron_parallel_r1.sync.control import RowScores, ServerControl, TokenRow
from megatron_parallel_r1.sync.disk import DiskTransport
from megatron_parallel_r1.sync.probe import OutputHead, ProbeScorer, ServerScores, TrainerScores, failure
from megatron_parallel_r1.sync.sender import Sender, Transport
from megatron_parallel_r1.sync.settings import Sync
from megatron_parallel_r1.sync.shared_memory import SHARED_MEMORY, SharedMemoryTransport


@dataclass(frozen=True, slots=True)
class PublishResult:
    """The result of a publication.

    Attributes:
        up_to_date: URLs of the servers that hold them; only these may serve requests.
        failed: why each other server does not, by URL. The next publication tries it again.
        difference: the largest between their log-probs and the trainer's, in nats.
        seconds: from the pause until the servers resumed.
    """

    version: int
    up_to_date: tuple[str, ...]
    failed: dict[str, str]
    difference: float
    bytes: int
    seconds: float


class Publisher:
    """See the module. All ranks call each method.

    Args:
        servers: those that take weights; only rank 0's count.
        rows: token ids of the probe, at least 2 per row.
        expected: computes the trainer's log-probs of them.
    """

    def __init__(
        self,
        servers: Sequence[ServerControl],
        model: Model,
        settings: Sync,
        rows: Sequence[TokenRow],
        expected: ProbeScorer,
    ) -> None:
        self.model, self.settings, self.rows = model, settings, rows
        self._expected = expected
        self._dtype = next(model.parameters()).dtype
        self._before: Sequence[RowScores] | None = None
        self._old_head: OutputHead | None = None
        self._sender = Sender(servers, _transport(model, settings), settings) if is_sender() else None

    def publish(self, version: int) -> PublishResult:
        """Sends the model's current weights to all servers.

        Args:
            version: their number, other than that of the previous publication.

        Raises:
            ServersLost: no server is left.
            UserError: a server computes with other weights than the trainer.
        """
        scores = self._expected(self.rows, None)
        layers = self.model.architecture.layers
        trained = TrainerScores(scores, self._before, None, _name(self._dtype), layers)
        started = time.perf_counter()
        wants_head = run_on_rank_zero(lambda: self._rank_zero_sender.pause())
        size = self._pass(version)
        while run_on_rank_zero(lambda: self._rank_zero_sender.close()):
            size = self._pass(version)
        run_on_rank_zero(lambda: self._rank_zero_sender.continue_generation())
        seconds = time.perf_counter() - started
        worst, failed = run_on_rank_zero(lambda: self._rank_zero_sender.probe(self.rows, trained))
        if failed:
            if self._old_head is not None:
                trained = replace(trained, old_head=self._expected(self.rows, self._old_head))
            run_on_rank_zero(lambda: self._fail(failed[0], trained, version))
        self._before = trained.scores
        self._old_head = self._head() if wants_head and self.model.architecture.tied else None
        return run_on_rank_zero(
            lambda: PublishResult(
                version,
                self._rank_zero_sender.up_to_date,
                dict(self._rank_zero_sender.failed),
                worst,
                size,
                seconds,
            )
        )

    def release(self) -> None:
        """Pauses the servers and frees their memory for the trainer."""
        run_on_rank_zero(lambda: self._rank_zero_sender.release_memory())

    def resume(self) -> None:
        """Allocates the servers' memory again. They stay paused, without weights, until `publish`."""
        run_on_rank_zero(lambda: self._rank_zero_sender.resume_memory())

    def add(self, server: ServerControl) -> None:
        """Adds a server from the next publication on, in place of any with the same URL."""
        if self._sender is not None:
            self._sender.servers[server.url] = server

    def remove(self, url: str) -> None:
        """Removes a server, if it is known."""
        if self._sender is not None:
            self._sender.servers.pop(url, None)

    def end(self) -> None:
        """Disconnects from the servers."""
        run_on_rank_zero(lambda: self._rank_zero_sender.end())

    @property
    def _rank_zero_sender(self) -> Sender:
        if self._sender is None:
            raise RuntimeError("only rank 0 speaks to servers")
        return self._sender

    def _pass(self, version: int) -> int:
        """Sends all weights once; returns their size in bytes, on rank 0."""
        run_on_rank_zero(lambda: self._rank_zero_sender.open(version))
        size = 0
        for bucket in gather_buckets(self.model, self.settings.bucket_bytes):
            size += bucket.bytes
            self._rank_zero_sender.send(bucket)
        return size

    def _head(self) -> OutputHead:
        """This rank's rows of the output matrix, copied to host memory."""
        rows_VE = own_parameters(self.model).get(EMBEDDING)
        return OutputHead(None if rows_VE is None else rows_VE.detach().cpu().clone())

    def _fail(self, answers: ServerScores, trained: TrainerScores, version: int) -> NoReturn:
        raise failure(answers, trained, self.settings.tolerance, version)


def _transport(model: Model, settings: Sync) -> Transport:
    weights = next(model.parameters())
    if settings.transport == "tensor":
        if not (weights.is_cuda or SHARED_MEMORY.is_dir()):
            raise UserError(f"sync.transport: tensor needs {SHARED_MEMORY}; set broadcast or disk")
        return SharedMemoryTransport()
    if settings.transport == "disk":
        assert settings.folder is not None  # `Sync` checks it.
        return DiskTransport(settings.folder, settings.keep, model.architecture, weights.dtype)
    return BroadcastTransport(settings, settings.backend or ("nccl" if weights.is_cuda else "gloo"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
