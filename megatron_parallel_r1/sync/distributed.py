"""Weights by broadcast: the sender and all processes of all servers are one process group."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import cast

from megatron_parallel_r1.rollout.servers.client import Unreachable
from megatron_parallel_r1.sync.buckets import Bucket
from megatron_parallel_r1.sync.control import Control, Facts, LiveControl, Meeting
from megatron_parallel_r1.sync.process_group import GroupBroken, SenderGroup, local_address
from megatron_parallel_r1.sync.sender import each, outcomes, over
from megatron_parallel_r1.sync.settings import Sync
from megatron_parallel_r1.sync.transport import Passed


class Distributed:
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
        self._servers: list[LiveControl] = []
        self._held: int | None = None
        self._version = 0
        self._lost: dict[str, str] = {}
        self._broken = False

    def open(self, servers: Sequence[Control], facts: Mapping[str, Facts], version: int) -> None:
        self._servers = [cast(LiveControl, server) for server in servers]
        self._version, self._lost, self._broken = version, {}, False
        members = {server.url: facts[server.url].processes for server in servers}
        as_left = self._held is not None and all(facts[url].version == self._held for url in members)
        if self._group is None or members != self._members or not as_left:
            self._regroup(members)
        self._held = None
        if not self._broken:
            _, self._lost = each(self._servers, lambda server: server.begin())
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
                group.broadcast([tensor for _name, tensor in bucket.tensors], lambda: bool(over(calls)))
                suspects = set(calls)
            except GroupBroken:
                suspects = over(calls)
                self._disband()
        self._blame(calls, suspects)

    def close(self) -> Passed:
        if not self._broken:
            _, self._lost = each(self._servers, lambda server: server.end())
            self._held = self._version
        return Passed(self._lost, self._broken)

    def end(self) -> None:
        self._disband()
        for name in self._disbanded:
            each(self._servers, lambda server, name=name: server.leave(name))
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

        def meeting(url: str) -> Meeting:
            return Meeting(group.address, group.port, group.name, group.backend, group.size, ranks[url])

        with ThreadPoolExecutor(len(self._servers)) as pool:
            calls = {server.url: pool.submit(server.join, meeting(server.url)) for server in self._servers}
            try:
                group.meet(lambda: bool(over(calls)))
                self._group, self._members = group, members
                suspects = set(calls)
            except GroupBroken:
                suspects = over(calls)
        self._blame(calls, suspects)

    def _blame(self, calls: dict[str, Future[None]], suspects: set[str]) -> None:
        """Sets what was lost by calls that are to do something together.

        A server that is there tells that it failed also where that is the fault of one that went away.

        Args:
            suspects: those whose failure does not follow from that of the group.
        """
        _, reasons = outcomes(calls)
        away = {url for url in reasons if isinstance(calls[url].exception(), Unreachable)}
        self._lost |= {url: why for url, why in reasons.items() if url in (away or suspects)}
        self._broken = self._group is None or bool(reasons)

    def _disband(self) -> None:
        group, self._group, self._members = self._group, None, {}
        if group is not None:
            self._disbanded.append(group.name)
            # gloo ends a broadcast under way only when its time is over, and waits for that.
            threading.Thread(target=group.close, daemon=True, name="weight sync group's end").start()
