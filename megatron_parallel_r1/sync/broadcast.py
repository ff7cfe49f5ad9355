"""Weights by broadcast: the sender and all processes of all servers are one process group."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from itertools import accumulate
from typing import cast
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor

from megatron_parallel_r1.rollout.servers.client import Unreachable
from megatron_parallel_r1.sync.buckets import Bucket
from megatron_parallel_r1.sync.control import LiveServerControl, Rendezvous, ServerControl, WeightsInfo
from megatron_parallel_r1.sync.sender import PassResult, collect_results, failed_urls, map_servers
from megatron_parallel_r1.sync.settings import Sync


class BroadcastTransport:
    """See `Transport`. The group lasts as long as its servers do.

    One that was started anew is known by its version, which is not that of the last broadcast. If a server
    goes away in a pass, the group is broken for all; the next pass makes another one without it.

    Args:
        settings: their transport is `distributed`.
        backend: nccl or gloo.
    """

    def __init__(self, settings: Sync, backend: str) -> None:
        self.settings, self.backend = settings, backend
        self._group: SenderGroup | None = None
        self._members: dict[str, int] = {}
        self._disbanded: list[str] = []
        self._servers: list[LiveServerControl] = []
        self._held: int | None = None
        self._version = 0
        self._lost: dict[str, str] = {}
        self._broken = False

    def open(self, servers: Sequence[ServerControl], facts: Mapping[str, WeightsInfo], version: int) -> None:
        self._servers = [cast(LiveServerControl, server) for server in servers]
        self._version, self._lost, self._broken = version, {}, False
        members = {server.url: facts[server.url].processes for server in servers}
        as_left = self._held is not None and all(facts[url].version == self._held for url in members)
        if self._group is None or members != self._members or not as_left:
            self._regroup(members)
        self._held = None
        if not self._broken:
            _, self._lost = map_servers(self._servers, lambda server: server.begin())
            self._broken = bool(self._lost)

    def send(self, bucket: Bucket) -> None:
        group = self._group
        if self._broken or group is None:
            return
        names = [name for name, _tensor in bucket.tensors]
        dtypes = [str(tensor.dtype).removeprefix("torch.") for _name, tensor in bucket.tensors]
        shapes = [list(tensor.shape) for _name, tensor in bucket.tensors]
        version = self._version if bucket.last else None
        with ThreadPoolExecutor(len(self._servers)) as pool:
            calls = {
                server.url: pool.submit(server.take_broadcast, names, dtypes, shapes, group.name, version)
                for server in self._servers
            }
            try:
                group.broadcast(
                    [tensor for _name, tensor in bucket.tensors], lambda: bool(failed_urls(calls))
                )
                suspects = set(calls)
            except GroupBroken:
                suspects = failed_urls(calls)
                self._disband()
        self._blame(calls, suspects)

    def close(self) -> PassResult:
        if not self._broken:
            _, self._lost = map_servers(self._servers, lambda server: server.end())
            self._held = self._version
        return PassResult(self._lost, self._broken)

    def end(self) -> None:
        self._disband()
        for name in self._disbanded:
            map_servers(self._servers, lambda server, name=name: server.leave(name))
        self._disbanded.clear()

    def _regroup(self, members: dict[str, int]) -> None:
        self.end()
        settings, (first, *_) = self.settings, self._servers
        group = SenderGroup(
            f"weights-{uuid.uuid4().hex[:12]}",
            1 + sum(members.values()),
            self.backend,
            settings.address or local_address(first.url),
            settings.timeout_s,
        )
        ranks = dict(zip(members, accumulate(members.values(), initial=1), strict=False))

        def meeting(url: str) -> Rendezvous:
            return Rendezvous(group.address, group.port, group.name, group.backend, group.size, ranks[url])

        with ThreadPoolExecutor(len(self._servers)) as pool:
            calls = {server.url: pool.submit(server.join, meeting(server.url)) for server in self._servers}
            try:
                group.meet(lambda: bool(failed_urls(calls)))
                self._group, self._members = group, members
                suspects = set(calls)
            except GroupBroken:
                suspects = failed_urls(calls)
        self._blame(calls, suspects)

    def _blame(self, calls: dict[str, Future[None]], suspects: set[str]) -> None:
        """Sets what was lost by calls that are to do something together.

        A server that is there tells that it failed also where that is the fault of one that went away.

        Args:
            suspects: those whose failure does not follow from that of the group.
        """
        _, reasons = collect_results(calls)
        away = {url for url in reasons if isinstance(calls[url].exception(), Unreachable)}
        self._lost |= {url: why for url, why in reasons.items() if url in (away or suspects)}
        self._broken = self._group is None or bool(reasons)

    def _disband(self) -> None:
        group, self._group, self._members = self._group, None, {}
        if group is not None:
            self._disbanded.append(group.name)
            # gloo ends a broadcast under way only when its time is over, and waits for that.
            threading.Thread(target=group.close, daemon=True, name="weight sync group's end").start()


POLL_S = 0.0005


class GroupBroken(Exception):
    """The group can carry nothing any more."""


class SenderGroup:
    """The sender's end. Servers are told `address` and `port`, then `meet` waits for them.

    Args:
        name: the same on all sides.
        size: processes, the sender included.
        backend: nccl or gloo.
        address: of this machine, as the servers reach it.
        timeout_s: of the meeting, and of each broadcast.
    """

    def __init__(self, name: str, size: int, backend: str, address: str, timeout_s: float) -> None:
        self.name, self.size, self.backend, self.address = name, size, backend, address
        self.timeout = timedelta(seconds=timeout_s)
        # Its end ends whoever still waits in it, so that nobody waits for one that will not come.
        self._host: dist.TCPStore | None = dist.TCPStore(
            address, 0, size, is_master=True, timeout=self.timeout, wait_for_workers=False
        )
        self.port = self._host.port
        self._group: dist.ProcessGroupGloo | None = None
        self._met = threading.Event()

    def meet(self, given_up: Callable[[], bool]) -> None:
        """Waits until all processes have come.

        Args:
            given_up: asked now and then, whether somebody will not come.

        Raises:
            GroupBroken: they do not come, or not in time.
        """
        errors: list[Exception] = []
        thread = threading.Thread(target=self._meet, args=(errors,), daemon=True, name="weight sync meeting")
        thread.start()
        while not self._met.wait(POLL_S):
            if given_up():
                self.close()
                raise GroupBroken("a server did not join")
        if errors:
            self.close()
            raise GroupBroken(
                f"the servers did not meet the sender at {self.address}:{self.port} ({errors[0]})"
            )

    def _meet(self, errors: list[Exception]) -> None:
        try:
            store: dist.Store = dist.TCPStore(
                self.address, self.port, self.size, is_master=False, timeout=self.timeout
            )
            device = "cuda" if self.backend == "nccl" else "cpu"
            for prefix in (self.name, f"{self.name}/", f"{device}/"):
                store = dist.PrefixStore(prefix, store)
            kind = dist.ProcessGroupNCCL if self.backend == "nccl" else dist.ProcessGroupGloo
            self._group = kind(store, 0, self.size, self.timeout)
        except Exception as error:  # whatever it is, `meet` tells it
            errors.append(error)
        self._met.set()

    def broadcast(self, tensors: list[Tensor], given_up: Callable[[], bool]) -> None:
        """Sends tensors to all other processes, one after another; they may be changed when it returns.

        Raises:
            GroupBroken: somebody is gone, or `given_up` says so.
        """
        if self._group is None:
            raise GroupBroken("the group is gone")
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            for work in [self._group.broadcast([tensor], options) for tensor in tensors]:
                while not work.is_completed():
                    if given_up():
                        raise GroupBroken("a server broke off")
                    time.sleep(POLL_S)
                work.wait()
        except RuntimeError as error:
            raise GroupBroken(str(error).splitlines()[0]) from error

    def close(self) -> None:
        """Lets go of the connections: whoever still waits for this end gets an error."""
        if self._group is not None:
            self._group.abort()
        self._group = self._host = None


def local_address(url: str) -> str:
    """This machine's address on the way to a server. Sends nothing."""
    parts = urlsplit(url)
    found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
    family, kind, protocol, _name, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]
