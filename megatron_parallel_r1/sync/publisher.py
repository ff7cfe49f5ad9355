"""Publishes a trainer's weights to rollout servers, and goes on only if they compute with them.

A publication: the servers are paused; all weights pass by, bucket by bucket; the servers take the new
version's number and go on; and the probe holds their log-probs against the trainer's. All processes of the
trainer take part; the first of them speaks to the servers, and what goes wrong there is raised on all.

Where trainer and servers share GPUs: `release` before training, `resume` and `publish` after it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch

from megatron_parallel_r1.architecture.weight_table import EMBEDDING
from megatron_parallel_r1.distributed.collectives import run_on_rank_zero
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.model.weights import own_parameters
from megatron_parallel_r1.sync.broadcast import BroadcastTransport
from megatron_parallel_r1.sync.buckets import gather_buckets, is_sender
from megatron_parallel_r1.sync.control import RowScores, ServerControl, TokenRow
from megatron_parallel_r1.sync.disk import DiskTransport
from megatron_parallel_r1.sync.probe import OutputHead, ProbeScorer, ServerScores, TrainerScores, failure
from megatron_parallel_r1.sync.sender import Sender, Transport
from megatron_parallel_r1.sync.settings import Sync
from megatron_parallel_r1.sync.shared_memory import SharedMemoryTransport


@dataclass(frozen=True, slots=True)
class PublishResult:
    """What became of a publication.

    Attributes:
        version: that the servers in step hold.
        in_step: their URLs; only they may be asked for tokens.
        out: why each other server is out of step, by URL. It is tried again in the next publication.
        difference: the largest between their log-probs and the trainer's, in nats.
        bytes: of the weights.
        seconds: from the pause until the servers went on.
    """

    version: int
    in_step: tuple[str, ...]
    out: dict[str, str]
    difference: float
    bytes: int
    seconds: float


class Publisher:
    """See the module. Each method is called by all processes together.

    Args:
        servers: those that take weights; only the first process's count.
        model: whose weights are published.
        settings: how.
        rows: token ids of the probe, at least 2 a row.
        expected: the trainer's log-probs of them.
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
        """Brings the model's weights, as they are now, to all servers.

        Args:
            version: their number, not that of the publication before.

        Raises:
            ServersLost: no server is left.
            UserError: one computes with other weights than the trainer.
        """
        trained = TrainerScores(self._expected(self.rows, None), self._before, None, _name(self._dtype))
        started = time.perf_counter()
        wants_head = run_on_rank_zero(lambda: self._speaker.pause())
        size = self._pass(version)
        while run_on_rank_zero(lambda: self._speaker.close()):
            size = self._pass(version)
        run_on_rank_zero(lambda: self._speaker.continue_generation())
        seconds = time.perf_counter() - started
        worst, failed = run_on_rank_zero(lambda: self._speaker.probe(self.rows, trained))
        if failed:
            if self._old_head is not None:
                trained = replace(trained, old_head=self._expected(self.rows, self._old_head))
            run_on_rank_zero(lambda: self._fail(failed[0], trained, version))
        self._before = trained.scores
        self._old_head = self._head() if wants_head and self.model.architecture.tied else None
        return run_on_rank_zero(
            lambda: PublishResult(
                version, self._speaker.in_step, dict(self._speaker.out), worst, size, seconds
            )
        )

    def release(self) -> None:
        """Has the servers end what is under way and give their memory back: now the trainer may take it."""
        run_on_rank_zero(lambda: self._speaker.release_memory())

    def resume(self) -> None:
        """Gives the memory back to the servers. They stay paused, with no weights, until `publish`."""
        run_on_rank_zero(lambda: self._speaker.resume_memory())

    def add(self, server: ServerControl) -> None:
        """From the next publication on; another one of the same URL goes."""
        if self._sender is not None:
            self._sender.servers[server.url] = server

    def remove(self, url: str) -> None:
        """From now on, if it is known."""
        if self._sender is not None:
            self._sender.servers.pop(url, None)

    def end(self) -> None:
        """Leaves the servers."""
        run_on_rank_zero(lambda: self._speaker.end())

    @property
    def _speaker(self) -> Sender:
        if self._sender is None:
            raise RuntimeError("only the first process speaks to servers")
        return self._sender

    def _pass(self, version: int) -> int:
        """Sends all weights once; their bytes, on the first process."""
        run_on_rank_zero(lambda: self._speaker.open(version))
        size = 0
        for bucket in gather_buckets(self.model, self.settings.bucket_bytes):
            size += bucket.bytes
            self._speaker.send(bucket)
        return size

    def _head(self) -> OutputHead:
        """This process's part of the output matrix, copied out of the device's memory."""
        rows_VE = own_parameters(self.model).get(EMBEDDING)
        return OutputHead(None if rows_VE is None else rows_VE.detach().cpu().clone())

    def _fail(self, answers: ServerScores, trained: TrainerScores, version: int) -> NoReturn:
        raise failure(answers, trained, self.settings.tolerance, version)


def _transport(model: Model, settings: Sync) -> Transport:
    weights = next(model.parameters())
    if settings.transport == "tensor":
        return SharedMemoryTransport()
    if settings.transport == "disk":
        assert settings.folder is not None  # Sync has seen to it.
        return DiskTransport(settings.folder, settings.keep, model.architecture, weights.dtype)
    return BroadcastTransport(settings, settings.backend or ("nccl" if weights.is_cuda else "gloo"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
