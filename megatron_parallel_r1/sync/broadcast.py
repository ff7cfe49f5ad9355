"""Sends weights by broadcast: the sender and all processes of all servers form one process group.

torch.distributed only knows groups of one launch: its public calls split the world that the processes of a
launch share. SGLang's side creates the group with `_new_process_group_helper` over a store of its own
(`init_custom_process_group` in sglang/srt/utils/common.py); here the same backend joins it over the same
store, under the same prefixes, without registering it in torch's tables or touching Megatron's groups.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from itertools import accumulate
from typing import Protocol, cast
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_parallel_r1.rollout.servers.client import Unreachable
from megatron_parallel_r1.sync.buckets import Bucket
from megatron_parallel_r1.sync.control import LiveServerControl, Rendezvous, ServerControl, WeightsInfo
from megatron_parallel_r1.sync.sender import PassResult, collect_results, failed_urls, map_servers
from megatron_parallel_r1.sync.settings import Sync

LOG = logging.getLogger(__name__)


class BroadcastTransport:
    """See `Transport`. The group, of `backend` nccl or gloo, lasts as long as its servers do.

    The bytes of a bucket's tensors, one after another, are one broadcast (SGLang's `flattened_bucket`): a
    model of many experts has thousands of tensors. The sender holds them twice meanwhile.

    A restarted server is recognized by its version, which is not that of the last broadcast. If a server dies
    during a pass, the group is broken for all; the next pass creates another one without it.
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

    def open(self, servers: Sequence[ServerControl], infos: Mapping[str, WeightsInfo], version: int) -> None:
        self._servers = [cast(LiveServerControl, server) for server in servers]
        self._version, self._lost, self._broken = version, {}, False
        members = {server.url: infos[server.url].processes for server in servers}
        unchanged = self._held is not None and all(infos[url].version == self._held for url in members)
        if self._group is None or members != self._members or not unchanged:
            self._regroup(members)
        self._held = None
        if not self._broken:
            _, self._lost = map_servers(self._servers, lambda server: server.begin_update())
            self._broken = bool(self._lost)

    def send(self, bucket: Bucket) -> None:
        group = self._group
        if self._broken or group is None:
            return
        # The widest dtypes first, so that each tensor starts at a multiple of its own.
        tensors = sorted(bucket.tensors, key=lambda named: -named[1].itemsize)
        names = [name for name, _tensor in tensors]
        dtypes = [str(tensor.dtype).removeprefix("torch.") for _name, tensor in tensors]
        shapes = [list(tensor.shape) for _name, tensor in tensors]
        flat_B = torch.cat([tensor.reshape(-1).view(torch.uint8) for _name, tensor in tensors])
        version = self._version if bucket.last else None
        with ThreadPoolExecutor(len(self._servers)) as pool:
            calls = {
                server.url: pool.submit(server.receive_broadcast, names, dtypes, shapes, group.name, version)
                for server in self._servers
            }
            try:
                group.broadcast(flat_B, lambda: bool(failed_urls(calls)))
                suspects = set(calls)
            except GroupBroken as error:
                LOG.warning("the broadcast of weights broke off: %s", str(error))
                suspects = failed_urls(calls)
                self._disband()
        self._record_lost(calls, suspects)

    def close(self) -> PassResult:
        if not self._broken:
            _, self._lost = map_servers(self._servers, lambda server: server.end_update())
            self._held = self._version
        return PassResult(self._lost, self._broken)

    def end(self) -> None:
        self._disband()
        for name in self._disbanded:

            def leave(server: LiveServerControl, name: str = name) -> None:
                server.leave_group(name)

            map_servers(self._servers, leave)
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

        def rendezvous(url: str) -> Rendezvous:
            return Rendezvous(group.address, group.port, group.name, group.backend, group.size, ranks[url])

        with ThreadPoolExecutor(len(self._servers)) as pool:
            calls = {
                server.url: pool.submit(server.join_group, rendezvous(server.url)) for server in self._servers
            }
            try:
                group.connect(lambda: bool(failed_urls(calls)))
                self._group, self._members = group, members
                suspects = set(calls)
            except GroupBroken as error:
                LOG.warning("no process group for the weights: %s", str(error))
                suspects = failed_urls(calls)
        self._record_lost(calls, suspects)

    def _record_lost(self, calls: dict[str, Future[None]], suspects: set[str]) -> None:
        """Records the servers to blame for failures of a collective operation.

        A live server also reports a failure that a dead one caused.

        Args:
            suspects: servers whose failure does not merely follow from the group's.
        """
        _, reasons = collect_results(calls)
        unreachable = {url for url in reasons if isinstance(calls[url].exception(), Unreachable)}
        self._lost |= {url: why for url, why in reasons.items() if url in (unreachable or suspects)}
        self._broken = self._group is None or bool(reasons)

    def _disband(self) -> None:
        group, self._group, self._members = self._group, None, {}
        if group is not None:
            self._disbanded.append(group.name)
            # gloo aborts a running broadcast only at its timeout, and waits for it.
            threading.Thread(target=group.close, daemon=True, name="weight sync close").start()


POLL_S = 0.0005
# The group's own timeout comes first: it says more.
LATE_S = 5.0


class GroupBroken(Exception):
    """The group cannot communicate any more."""


class _Backend(Protocol):
    def broadcast(self, tensors: list[Tensor], options: dist.BroadcastOptions) -> dist.Work: ...

    def abort(self) -> None: ...


class SenderGroup:
    """The sender's end, rank 0. Servers get `address` and `port`; `connect` waits for them.

    Args:
        name: the same on all sides.
        size: processes, the sender included.
        address: of this machine, as the servers reach it.
        timeout_s: of connecting, and of each broadcast.
    """

    def __init__(self, name: str, size: int, backend: str, address: str, timeout_s: float) -> None:
        self.name, self.size, self.backend, self.address = name, size, backend, address
        self.timeout = timedelta(seconds=timeout_s)
        # Closing the store ends every wait in it, so that nobody waits for a dead process.
        self._host: dist.TCPStore | None = dist.TCPStore(
            address, 0, size, is_master=True, timeout=self.timeout, wait_for_workers=False
        )
        self.port = self._host.port
        self._group: _Backend | None = None

    def connect(self, given_up: Callable[[], bool]) -> None:
        """Waits until all processes have joined; polls `given_up`, whether one will not.

        Raises:
            GroupBroken: a process does not join, or not in time.
        """
        try:
            self._in_thread(self._join, given_up, "a server did not join")
        except GroupBroken:
            self.close()
            raise
        except RuntimeError as error:
            self.close()
            raise GroupBroken(
                f"the servers did not join the sender at {self.address}:{self.port} ({error})"
            ) from error

    def _join(self) -> None:
        store: dist.Store = dist.TCPStore(
            self.address, self.port, self.size, is_master=False, timeout=self.timeout
        )
        device = "cuda" if self.backend == "nccl" else "cpu"
        for prefix in (self.name, f"{self.name}/", f"{device}/"):
            store = dist.PrefixStore(prefix, store)
        backend = dist.ProcessGroupNCCL if self.backend == "nccl" else dist.ProcessGroupGloo
        # torch's stubs lack what both have: a constructor with a timeout, and `broadcast`.
        self._group = cast(Callable[..., _Backend], backend)(store, 0, self.size, self.timeout)

    def broadcast(self, tensor: Tensor, given_up: Callable[[], bool]) -> None:
        """Sends a tensor to all other processes; it may be changed afterwards.

        Raises:
            GroupBroken: a process died, `given_up` returns true, or the time limit is over.
        """
        group = self._group
        if group is None:
            raise GroupBroken("the group is closed")
        options = dist.BroadcastOptions()
        options.rootRank = 0
        stream = torch.cuda.current_stream() if self.backend == "nccl" else None
        posted: list[dist.Work] = []

        def post() -> None:
            with torch.cuda.stream(stream):
                posted.append(group.broadcast([tensor], options))

        try:
            # The first one over nccl creates the communicator and returns only once all others take part.
            self._in_thread(post, given_up, "a server failed")
            for work in posted:
                self._wait(work.is_completed, given_up, "a server failed")
                work.wait()
        except RuntimeError as error:
            raise GroupBroken(str(error).splitlines()[0]) from error

    def _in_thread(self, work: Callable[[], None], given_up: Callable[[], bool], why: str) -> None:
        """Runs `work`, which may block for ever, in a thread that nobody has to wait for.

        Raises:
            GroupBroken: as `_wait`.
            RuntimeError: of `work`.
        """
        # Texts alone: a traceback would keep the group alive, and servers waiting for it.
        errors: list[str] = []

        def run() -> None:
            try:
                work()
            except Exception as error:  # raised below
                errors.append(str(error) or type(error).__name__)

        thread = threading.Thread(target=run, daemon=True, name="weight sync")
        thread.start()
        self._wait(lambda: not thread.is_alive(), given_up, why)
        if errors:
            raise RuntimeError(errors[0])

    def _wait(self, done: Callable[[], bool], given_up: Callable[[], bool], why: str) -> None:
        """Polls until `done`.

        Raises:
            GroupBroken: `given_up`, with the reason `why`, or the time limit is over.
        """
        end = time.monotonic() + self.timeout.total_seconds() + LATE_S
        while not done():
            if given_up():
                raise GroupBroken(why)
            if time.monotonic() > end:
                raise GroupBroken(f"no answer within {self.timeout.total_seconds():g} s")
            time.sleep(POLL_S)

    def close(self) -> None:
        """Closes the connections; processes that still wait for this one get an error."""
        if self._group is not None:
            self._group.abort()
        self._group = self._host = None


def local_address(url: str) -> str:
    """This machine's address on the route to a server. Sends nothing."""
    parts = urlsplit(url)
    found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
    family, kind, protocol, _name, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]
