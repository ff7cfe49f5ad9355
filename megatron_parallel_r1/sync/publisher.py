"""Publishes a trainer's weights to rollout servers, and continues only if they compute with them.

A publication pauses the servers, sends all weights bucket by bucket, sets the new version, resumes the
servers, and compares their log-probs with the trainer's (the probe). All ranks of the trainer take part; rank
0 speaks to the servers, or each rank to those beside it, and errors are raised on all ranks.

If trainer and servers share GPUs, call `release` before training. The next publication takes the servers'
memory again: that of their weights before it sends any, that of their cache once they have them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar, cast

import torch

from megatron_parallel_r1.architecture.weight_table import EMBEDDING
from megatron_parallel_r1.distributed.collectives import barrier, run_on_rank_zero, run_on_ranks
from megatron_parallel_r1.errors import ServersLost, UserError
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

R = TypeVar("R")


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
        colocated: servers share the ranks' GPUs. By transport `tensor` each rank sends its weights to
            `servers` of its own, which some ranks may not have.
        asleep: the servers have released their memory.
    """

    def __init__(
        self,
        servers: Sequence[ServerControl],
        model: Model,
        settings: Sync,
        rows: Sequence[TokenRow],
        expected: ProbeScorer,
        colocated: bool = False,
        asleep: bool = False,
    ) -> None:
        self.model, self.settings, self.rows = model, settings, rows
        self._expected = expected
        self._dtype = next(model.parameters()).dtype
        self._before: Sequence[RowScores] | None = None
        self._old_head: OutputHead | None = None
        self._colocated, self._beside = colocated, colocated and settings.transport == "tensor"
        self._sender: Sender | None = None
        if servers if self._beside else is_sender():
            self._sender = Sender(servers, _transport(model, settings), settings, asleep)

    def publish(self, version: int) -> PublishResult:
        """Sends the model's current weights to all servers.

        Args:
            version: their number, other than that of the previous publication.

        Raises:
            ServersLost: no server is left.
            UserError: a server computes with other weights than the trainer.
        """
        scores = self._expected(self.rows, None)
        if self._beside:
            scores = run_on_rank_zero(lambda: scores)
        layers = self.model.architecture.layers
        trained = TrainerScores(scores, self._before, None, _name(self._dtype), layers)
        self._yield_memory()
        started = time.perf_counter()
        wants_head = any(self._on_senders(lambda sender: sender.pause()))
        size = self._pass(version)
        while any(self._on_senders(lambda sender: sender.close())):
            size = self._pass(version)
        self._yield_memory()
        self._on_senders(lambda sender: sender.resume_memory("kv_cache"))
        self._on_senders(lambda sender: sender.continue_generation())
        seconds = time.perf_counter() - started
        probes = self._on_senders(lambda sender: sender.probe(self.rows, trained))
        if failed := [answers for _worst, some in probes for answers in some]:
            if self._old_head is not None:
                trained = replace(trained, old_head=self._expected(self.rows, self._old_head))
            run_on_rank_zero(lambda: self._fail(failed[0], trained, version))
        self._before = trained.scores
        self._old_head = self._head() if wants_head and self.model.architecture.tied else None
        states = self._on_senders(lambda sender: (sender.up_to_date, dict(sender.failed)))
        return run_on_rank_zero(
            lambda: PublishResult(
                version,
                tuple(url for urls, _failed in states for url in urls),
                {url: why for _urls, failed in states for url, why in failed.items()},
                max(worst for worst, _some in probes),
                size,
                seconds,
            )
        )

    def release(self) -> None:
        """Pauses the servers and frees their memory for the trainer."""
        self._on_senders(lambda sender: sender.release_memory())

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
        self._on_senders(lambda sender: sender.end())

    def _on_senders(self, work: Callable[[Sender], R]) -> list[R]:
        """Returns on every rank what `work` returns for each sender that has servers left.

        Raises:
            ServersLost: no sender has any.
        """

        def attempt() -> tuple[R | None, ServersLost | None]:
            assert self._sender is not None, "only senders speak to servers"
            try:
                return work(self._sender), None
            except ServersLost as error:
                error.on_all_ranks = True
                return None, error

        if self._beside:
            outcomes = run_on_ranks(attempt if self._sender is not None else None)
        else:
            outcomes = [run_on_rank_zero(attempt)]
        lost = [error for _result, error in outcomes if error is not None]
        if lost and len(lost) == len(outcomes):
            raise lost[0]
        return [cast(R, result) for result, error in outcomes if error is None]

    def _yield_memory(self) -> None:
        """Returns torch's cached memory, and that of buckets, to the GPUs, which servers share."""
        if not self._colocated:
            return
        if next(self.model.parameters()).is_cuda:
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()
        barrier()

    def _pass(self, version: int) -> int:
        """Sends all weights once; returns their size in bytes, on rank 0."""
        self._on_senders(lambda sender: sender.open(version))
        size = 0
        for bucket in gather_buckets(self.model, self.settings.bucket_bytes, self._beside):
            size += bucket.bytes
            if self._sender is not None:
                self._sender.send(bucket)
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
