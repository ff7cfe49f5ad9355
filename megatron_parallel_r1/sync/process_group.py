"""A process group of the sender, rank 0, with the processes of rollout servers.

torch.distributed knows groups of one launch only: its public calls make parts of the world that the processes
of a launch share. SGLang's side makes the group with `_new_process_group_helper` over a store of its own
(`init_custom_process_group` in sglang/srt/utils/common.py); here the same backend meets it in the same store,
under the same prefixes, without a trace in torch's tables. Megatron's groups are beside it.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor

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
