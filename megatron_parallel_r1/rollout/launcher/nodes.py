"""One server over several machines: each has a supervisor, which runs this machine's part of the server.

The supervisor of the first machine decides. Once all others are connected, it names an address at which the
parts meet, and each starts its part. If a part ends, all end theirs and start anew, at another address, so
that parts of different starts never meet.

Messages are lines over TCP. To the first: `join RANK SERVED`, `lost HOST:PORT REASON`. To the others: `start
HOST:PORT`, `end` (the part), `leave` (for good), `refuse REASON`.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import LaunchSettings
from megatron_parallel_r1.rollout.launcher.guard import adopt_orphans, end_descendants
from megatron_parallel_r1.rollout.launcher.ports import bind, bind_free
from megatron_parallel_r1.rollout.launcher.supervisor import POLL_SECONDS, ServerProcess

# A machine that crashed is noticed after IDLE + COUNT x INTERVAL seconds.
KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}
CONNECT_SECONDS = 10.0


def check_nodes(settings: LaunchSettings) -> None:
    """Checks the machines that one server is to extend over.

    Raises:
        UserError: a server cannot extend over the machines that the settings say.
    """
    nodes, rank, meeting = settings.nodes, settings.node_rank, settings.rendezvous
    if nodes == 1:
        if rank or meeting:
            raise UserError("--node-rank and --rendezvous are for one server over several --nodes")
        return
    if settings.engine != "sglang":
        raise UserError(
            f"--nodes: SGLang's servers can extend over several machines, {settings.engine}'s cannot here"
        )
    if settings.servers > 1 or settings.data > 1:
        raise UserError(
            f"--nodes={nodes}: one server of one copy takes the machines whole; leave out --servers and --dp"
        )
    if settings.tensor % nodes:
        raise UserError(f"--tp={settings.tensor} does not divide into --nodes={nodes} equal parts")
    if rank >= nodes:
        raise UserError(f"--node-rank={rank}: the {nodes} machines have the ranks 0 to {nodes - 1}")
    host, _, port = (meeting or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"--rendezvous={meeting or ''}: give each of the {nodes} machines HOST:PORT of the first"
        )


def _served(settings: LaunchSettings) -> str:
    """What all parts must agree in."""
    return f"{settings.checkpoint}, tp {settings.tensor} on {settings.nodes} nodes"


class Link:
    """Lines of text over a TCP connection; no call waits for the other side."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.open = True
        self._connection, self._unread = connection, b""

    def send(self, line: str) -> None:
        try:
            self._connection.sendall(f"{' '.join(line.split())}\n".encode())
        except OSError:
            self.close()

    def lines(self) -> list[str]:
        """The lines that have come since the last call."""
        with suppress(BlockingIOError):
            try:
                while received := self._connection.recv(4096):
                    self._unread += received
                self.close()
            except BlockingIOError:
                raise
            except OSError:
                self.close()
        *lines, self._unread = self._unread.split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def close(self) -> None:
        self.open = False
        self._connection.close()


class PartsRendezvous:
    """The first machine's connections to the supervisors of the others: a context manager.

    Attributes:
        meeting: where the parts of the last start meet.
    """

    def __init__(self, settings: LaunchSettings) -> None:
        """
        Raises:
            UserError: the port is taken.
        """
        assert settings.rendezvous is not None
        self.host, _, port = settings.rendezvous.rpartition(":")
        self._others, self._served = settings.nodes - 1, _served(settings)
        self.meeting = ""
        self._links: dict[int, Link] = {}
        self._new: list[Link] = []
        self._listener = socket.socket()
        try:
            bind(self._listener, "0.0.0.0", int(port))
        except UserError as error:
            raise UserError(f"--rendezvous={settings.rendezvous}: {error}") from None
        self._listener.setblocking(False)

    def __enter__(self) -> PartsRendezvous:
        return self

    def __exit__(self, *_: object) -> None:
        self.send("leave")
        for link in (*self._links.values(), *self._new):
            link.close()
        self._listener.close()

    @property
    def complete(self) -> bool:
        """Whether all other machines are connected."""
        return len(self._links) == self._others

    def send(self, line: str) -> None:
        """Sends a line to all other machines."""
        for link in self._links.values():
            link.send(line)

    def losses(self) -> list[str]:
        """Lets new machines join; why parts of the last start have ended since the last call."""
        losses = []
        for rank, link in list(self._links.items()):
            lost = f"lost {self.meeting} "
            losses += [
                f"lost its part on node {rank}: {line.removeprefix(lost)}"
                for line in link.lines()
                if line.startswith(lost)
            ]
            if not link.open:
                losses.append(f"lost node {rank}")
                del self._links[rank]
        with suppress(BlockingIOError):
            while True:
                self._new.append(Link(self._listener.accept()[0]))
        for link in list(self._new):
            if (lines := link.lines()) or not link.open:
                self._new.remove(link)
                losses += self._admit(link, lines[0] if lines else "")
        return losses

    def _admit(self, link: Link, line: str) -> list[str]:
        word, rank, served = (*line.split(" ", 2), "", "")[:3]
        if word != "join" or not rank.isdecimal() or not 1 <= int(rank) <= self._others:
            link.close()
        elif served != self._served:
            link.send(
                f"refuse it has {served}, the first one {self._served}; give all machines the same options"
            )
            link.close()
        else:
            before = self._links.pop(int(rank), None)
            self._links[int(rank)] = link
            if before is not None:
                before.close()
                return [f"lost node {rank}"]
        return []


class FirstPart(ServerProcess):
    """The first machine's part of a server, which stands for the whole server."""

    def __init__(self, part: ServerProcess, rendezvous: PartsRendezvous) -> None:
        super().__init__(part.command, part.url, part.log)
        self._whole, self._rendezvous = part.command, rendezvous
        self._running = False

    def start(self) -> None:
        """Has all parts start as soon as all machines are connected, which `failure` waits for."""
        self._started = time.monotonic()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch()

    def failure(self) -> str | None:
        losses = self._rendezvous.losses()
        if self._running:
            return losses[0] if losses else super().failure()
        if self._rendezvous.complete:
            with socket.socket() as listener:
                meeting = f"{self._rendezvous.host}:{bind_free(listener, '0.0.0.0')}"
            self.command = self._whole.meeting(meeting)
            super().start()
            self._rendezvous.meeting = meeting
            self._rendezvous.send(f"start {meeting}")
            self._running = True
        return None

    def healthy(self) -> bool:
        return self._running and super().healthy()

    def end(self) -> None:
        self._rendezvous.send("end")
        self._running = False
        super().end()


def serve_part(
    settings: LaunchSettings,
    part: ServerProcess,
    tell: Callable[[str], None],
    stopped: Callable[[], bool],
) -> None:
    """Runs this machine's part of a server, whenever the first machine says, until that leaves for good.

    Args:
        part: not started; its command lacks the address at which the parts meet.

    Raises:
        UserError: the first machine refuses this one, or cannot be reached for `start_seconds`.
    """
    adopt_orphans()
    node, whole = f"node {settings.node_rank}", part.command
    while (link := _connect(settings, stopped)) is not None:
        link.send(f"join {settings.node_rank} {_served(settings)}")
        tell(f"{node}  joined {settings.rendezvous}  log {part.log}")
        running, meeting = False, ""
        try:
            while link.open and not stopped():
                for line in link.lines():
                    word, _, meeting = line.partition(" ")
                    if word == "refuse":
                        raise UserError(f"{settings.rendezvous} refuses {node}: {meeting}")
                    _end(part)
                    running = word == "start"
                    if word == "leave":
                        return
                    if running:
                        part.command = whole.meeting(meeting)
                        part.start()
                if running and (why := part.failure()) is not None:
                    tell(f"{node} {why}; see {part.log}, which ends with: {' '.join(part.last_lines(1))}")
                    link.send(f"lost {meeting} {why}; see {part.log}")
                    _end(part)
                    running = False
                time.sleep(POLL_SECONDS)
        finally:
            link.close()
            _end(part)
        if not stopped():
            tell(f"{node} lost {settings.rendezvous}; joining again")


def _end(part: ServerProcess) -> None:
    part.end()
    end_descendants()


def _connect(settings: LaunchSettings, stopped: Callable[[], bool]) -> Link | None:
    """A connection to the first machine, which may start later; None if stopped before."""
    assert settings.rendezvous is not None
    host, _, port = settings.rendezvous.rpartition(":")
    end = time.monotonic() + settings.start_seconds
    while not stopped():
        try:
            return Link(socket.create_connection((host, int(port)), CONNECT_SECONDS))
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"--rendezvous={settings.rendezvous}: no connection for {settings.start_seconds:g} s "
                    f"({error.strerror or error}); start `serve-rollout --node-rank 0` there"
                ) from None
        time.sleep(POLL_SECONDS)
    return None
