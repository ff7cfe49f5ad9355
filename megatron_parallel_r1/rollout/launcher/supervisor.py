"""Several servers: waits until they are healthy, starts a crashed one again, up to a number of times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.guard import adopt_orphans, end_descendants
from megatron_parallel_r1.rollout.launcher.server_process import Child

POLL_SECONDS = 0.2


class Supervisor:
    """Of children that it starts and ends: a context manager."""

    def __init__(
        self,
        children: Sequence[Child],
        crashes: int,
        start_seconds: float,
        tell: Callable[[str], None],
        alone: bool = False,
    ) -> None:
        """Starts nothing yet; `crashes` and `start_seconds` as in settings.Serving.

        Args:
            tell: is given a line about each thing that happens.
            alone: this process has no other children, so that it may end whatever a killed guard leaves.
        """
        self._children = children
        self._crashes = crashes
        self._start_seconds = start_seconds
        self._tell = tell
        self._alone = alone
        self._healthy = [False] * len(children)
        self._failed = [0] * len(children)

    def __enter__(self) -> Supervisor:
        if self._alone:
            adopt_orphans()
        for child in self._children:
            child.start()
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.tell_to_end()
        for child in self._children:
            child.end()

    @property
    def healthy(self) -> bool:
        """Whether all are, as of the last `look`."""
        return all(self._healthy)

    def look(self) -> None:
        """Looks at each once, and does what is needed.

        Raises:
            UserError: one crashed too often.
        """
        for index, child in enumerate(self._children):
            if child.status is not None:
                self._crashed(index, f"ended with status {child.status}")
            elif not self._healthy[index] and child.healthy():
                self._healthy[index] = True
                self._failed[index] = 0
                self._tell(f"server {index}  {child.url}  pid {child.pid}  log {child.log}")
            elif not self._healthy[index] and child.age > self._start_seconds:
                self._crashed(index, f"is not healthy after {self._start_seconds:g} s")
        time.sleep(POLL_SECONDS)

    def _crashed(self, index: int, how: str) -> None:
        child = self._children[index]
        child.end()
        if self._alone:
            end_descendants(keep=frozenset(other.guard_pid for other in self._children if other is not child))
        self._healthy[index] = False
        self._failed[index] += 1
        if self._failed[index] >= self._crashes:
            last = " ".join(child.last_lines(1))
            raise UserError(
                f"server {index} {how}, {self._failed[index]} times without being healthy in between; "
                f"look into {child.log}, which ends: {last}"
            )
        self._tell(f"server {index} {how}; starting it again")
        child.start()
