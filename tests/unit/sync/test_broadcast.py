"""Broadcasts to servers that come, go and refuse. The servers are stand-ins in threads of this process; the
process group between them and the sender is a real one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_parallel_r1.errors import ServersLost, UserError
from megatron_parallel_r1.rollout.servers.client import Unreachable
from megatron_parallel_r1.sync.broadcast import BroadcastTransport
from megatron_parallel_r1.sync.buckets import Bucket
from megatron_parallel_r1.sync.control import Rendezvous, WeightsInfo
from megatron_parallel_r1.sync.sender import PassResult, Sender
from megatron_parallel_r1.sync.settings import Sync

A, B = "http://127.0.0.1:1", "http://127.0.0.1:2"
# How long a side may wait for one that is gone; on a busy machine a thread may be late by seconds.
PATIENCE = timedelta(seconds=20)


class InThread:
    """Stands in for an SGLang server: what it was sent, and how it fails at which bucket."""

    kinds, wants_head = frozenset({"distributed"}), False

    def __init__(self, url: str, dies_at: str = "") -> None:
        self.url, self.dies_at = url, dies_at
        self.connected = threading.Event()
        self.version: int | None = None
        self.held: dict[str, torch.Tensor] = {}
        self.joined = 0
        self.fails: tuple[int, Callable[[], None]] | None = None
        self._groups: dict[str, dist.ProcessGroupGloo] = {}
        self._taken = 0

    def info(self) -> WeightsInfo:
        self._reach("info")
        return WeightsInfo(self.version, 1, "float32")

    def pause(self, in_flight: str) -> None: ...

    def continue_generation(self) -> None: ...

    def join_group(self, rendezvous: Rendezvous) -> None:
        self._reach("join")
        self.joined += 1
        where = (rendezvous.address, rendezvous.port, rendezvous.size)
        try:
            store: dist.Store = dist.TCPStore(*where, is_master=False, timeout=PATIENCE)
            self.connected.set()
            for prefix in (rendezvous.name, f"{rendezvous.name}/", "cpu/"):
                store = dist.PrefixStore(prefix, store)
            self._groups[rendezvous.name] = dist.ProcessGroupGloo(
                store, rendezvous.first, rendezvous.size, PATIENCE
            )
        except RuntimeError as error:
            raise UserError(f"{self.url}: failed to make the group: {error}") from error

    def leave_group(self, name: str) -> None:
        self._groups.pop(name, None)

    def begin_update(self) -> None:
        self._reach("begin")
        self._taken = 0

    def receive_broadcast(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], group: str, version: int | None
    ) -> None:
        self._taken += 1
        self._reach(f"bucket {self._taken}")
        if self.fails and self.fails[0] == self._taken:
            self.fails[1]()
        options = dist.BroadcastOptions()
        options.rootRank = 0
        wanted = [
            torch.empty(shape, dtype=getattr(torch, d)) for d, shape in zip(dtypes, shapes, strict=True)
        ]
        flat_B = torch.empty(sum(tensor.nbytes for tensor in wanted), dtype=torch.uint8)
        try:
            self._groups[group].broadcast([flat_B], options).wait()
        except RuntimeError as error:
            raise UserError(f"{self.url}: failed to receive weights: {error}") from error
        parts = flat_B.split([tensor.nbytes for tensor in wanted])
        for name, tensor, part_B in zip(names, wanted, parts, strict=True):
            # As SGLang views them: not every offset would do.
            assert part_B.storage_offset() % tensor.itemsize == 0
            self.held[name] = part_B.view(tensor.dtype).view(tensor.shape)
        self.version = self.version if version is None else version

    def end_update(self) -> None:
        self._reach("end")

    def _reach(self, where: str) -> None:
        """Dies for good at its place."""
        if where == self.dies_at:
            self.dies_at = "info"
            self.die()

    def die(self) -> None:
        self._groups.clear()
        raise Unreachable(f"{self.url} is gone")

    def refuse(self) -> None:
        raise UserError(f"{self.url} has another shape")


@pytest.fixture
def transport() -> Iterator[BroadcastTransport]:
    transport = BroadcastTransport(Sync(timeout_s=PATIENCE.total_seconds()), "gloo")
    yield transport
    transport.end()
    for thread in threading.enumerate():
        if thread.name == "weight sync group's end":
            thread.join()


def buckets(version: int) -> Iterator[Bucket]:
    for number in range(3):
        tensors = [(f"{number}.{name}", torch.full((4, 5), float(version + number))) for name in "ab"]
        yield Bucket(tensors, last=number == 2)


def one_pass(transport: BroadcastTransport, version: int, *servers: InThread) -> tuple[dict[str, str], bool]:
    transport.open(
        servers, {server.url: WeightsInfo(server.version, 1, "float32") for server in servers}, version
    )
    for bucket in buckets(version):
        transport.send(bucket)
    passed = transport.close()
    return dict(passed.lost), passed.again


def holds(server: InThread, version: int) -> bool:
    wanted = {f"{number}.{name}": version + number for number in range(3) for name in "ab"}
    return (
        server.version == version and {name: tensor.mean() for name, tensor in server.held.items()} == wanted
    )


def test_a_bucket_of_several_dtypes_arrives_bit_for_bit(transport: BroadcastTransport) -> None:
    """In an order in which no tensor starts between two of its numbers; scalars and odd lengths too."""
    server = InThread(A)
    tensors = [
        ("scale", torch.tensor([1.5], dtype=torch.float8_e4m3fn)),
        ("weight", torch.randn(3, 7).bfloat16()),
        ("router", torch.randn(5, 3)),
        ("step", torch.tensor(2.0**53, dtype=torch.float64)),
        ("transposed", torch.randn(4, 3).bfloat16().T),
    ]
    transport.open([server], {A: WeightsInfo(None, 1, "bfloat16")}, 1)
    transport.send(Bucket(tensors, last=True))
    assert transport.close() == PassResult({})
    assert server.held.keys() == dict(tensors).keys()
    for name, tensor in tensors:
        assert server.held[name].dtype == tensor.dtype
        assert server.held[name].float().equal(tensor.float())


def test_one_group_lasts_while_its_servers_do(transport: BroadcastTransport) -> None:
    one, other = InThread(A), InThread(B)
    for version in (1, 2):
        assert one_pass(transport, version, one, other) == ({}, False)
        assert holds(one, version) and holds(other, version)
    assert one.joined == other.joined == 1


def test_servers_join_leave_and_start_anew(transport: BroadcastTransport) -> None:
    one, other = InThread(A), InThread(B)
    assert one_pass(transport, 1, one) == ({}, False)
    assert one_pass(transport, 2, one, other) == ({}, False)
    anew = InThread(B)
    assert one_pass(transport, 3, one, anew) == ({}, False)
    assert holds(one, 3) and holds(anew, 3) and not holds(other, 3)
    assert one_pass(transport, 4, one) == ({}, False) and holds(one, 4)
    assert one.joined == 4


@pytest.mark.parametrize("way", ["die", pytest.param("refuse", marks=pytest.mark.slow)])
def test_one_that_fails_is_lost_and_the_others_take_all_again(
    transport: BroadcastTransport, way: str
) -> None:
    one, other = InThread(A), InThread(B)
    other.fails = (2, getattr(other, way))
    lost, again = one_pass(transport, 1, one, other)
    assert again and list(lost) == [B] and one.version is None
    assert one_pass(transport, 1, one) == ({}, False) and holds(one, 1)


def test_one_that_does_not_join_is_lost(transport: BroadcastTransport) -> None:
    one, other = InThread(A), InThread(B)
    other.join_group = lambda rendezvous: other.refuse()
    lost, again = one_pass(transport, 1, one, other)
    assert again and list(lost) == [B]
    assert one_pass(transport, 1, one) == ({}, False) and holds(one, 1)


def publish(transport: BroadcastTransport, *servers: InThread) -> Sender:
    """The steps of a publication, with as many passes as it takes."""
    sender = Sender(servers, transport, transport.settings)
    sender.pause()
    again = True
    while again:
        sender.open(1)
        for bucket in buckets(1):
            sender.send(bucket)
        again = sender.close()
    sender.continue_generation()
    return sender


PLACES = ("info", "join", "begin", "bucket 1", "bucket 2", "bucket 3", "end")


@pytest.mark.parametrize("place", PLACES)
def test_one_lost_anywhere_leaves_the_others_whole(transport: BroadcastTransport, place: str) -> None:
    """Or none: then that is the error. A wait for one that is gone would end at PATIENCE, as its failure."""
    one, other = InThread(A), InThread(B, dies_at=place)
    if place == "join":  # one that connects to a store that is gone tries for long
        other.join_group = lambda rendezvous: one.connected.wait() and other.die()
    sender = publish(transport, one, other)
    assert sender.up_to_date == (A,) and holds(one, 1) and list(sender.failed) == [B]
    with pytest.raises(ServersLost, match=rf"{B} is gone"):
        publish(transport, InThread(B, dies_at=place))
