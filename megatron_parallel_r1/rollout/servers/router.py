"""Chooses the server of each request: the one that has its prefix in the cache, while load allows.

- A trace stays with the server of its first request, its home: its forks share a prefix there.
- Traces of one prompt get the same home, unless that has clearly more load than the least loaded server.
- A request waits for a full home. Only a server at less than half of its limit takes over.

Nothing waits here: the router calls `Ticket.granted` when it is a request's turn.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key")

# Homes kept: traces and prompts of the last few batches. Older ones have left the caches.
REMEMBERED_KEYS = 65536


@dataclass(eq=False, slots=True)
class Ticket:
    """One request that wants a server.

    Attributes:
        prompt: hash of its prefix, equal for traces that begin alike.
        granted: called once, with the server's address.
    """

    trace: str
    prompt: int
    granted: Callable[[str], None]


class CacheAwareRouter:
    """Routes tickets, with at most `concurrent` requests in flight at a server.

    Attributes:
        in_flight: requests granted and not released yet, by address.
    """

    def __init__(self, concurrent: int) -> None:
        self.in_flight: Counter[str] = Counter()
        self._concurrent = concurrent
        self._usable: tuple[str, ...] = ()
        self._waiting: dict[str | None, deque[Ticket]] = {None: deque()}
        self._home_of_trace: _LruMap[str] = _LruMap()
        self._home_of_prompt: _LruMap[int] = _LruMap()

    def set_usable(self, urls: Sequence[str]) -> None:
        """Sets the servers to route to; of equally loaded ones the earlier comes first."""
        if tuple(urls) == self._usable:
            return
        self._usable = tuple(urls)
        # Traces under way before new ones, here and in `release`: their cached prefixes are costly.
        waiting = [ticket for queue in self._waiting.values() for ticket in queue]
        self._waiting = {**{url: deque() for url in urls}, None: deque()}
        for ticket in waiting:
            self.submit(ticket)

    def submit(self, ticket: Ticket) -> None:
        """Grants now, or when there is room."""
        home = self._home_of_trace.get(ticket.trace)
        if home not in self._usable:
            home = None
        url = self._with_room(ticket, home)
        if url is None:
            self._waiting[home].append(ticket)
        else:
            self._grant(ticket, url)

    def withdraw(self, ticket: Ticket) -> None:
        """Removes a ticket that was not granted yet."""
        for queue in self._waiting.values():
            if ticket in queue:
                queue.remove(ticket)

    def release(self, url: str) -> None:
        """Ends a granted request; its slot goes to a waiting ticket."""
        self.in_flight[url] -= 1
        while url in self._usable and self.in_flight[url] < self._concurrent:
            queue = self._waiting[url] or self._waiting[None] or self._queue_to_help(url)
            if not queue:
                return
            self._grant(queue.popleft(), url)

    def _with_room(self, ticket: Ticket, home: str | None) -> str | None:
        if not self._usable:
            return None
        least_loaded = min(self._usable, key=lambda url: self.in_flight[url])
        if home is not None:
            if self.in_flight[home] < self._concurrent:
                return home
            return least_loaded if self._has_spare(least_loaded) else None
        known = self._home_of_prompt.get(ticket.prompt)
        slack = max(2, self._concurrent // 8)
        if known in self._usable and self.in_flight[known] <= self.in_flight[least_loaded] + slack:
            least_loaded = known
        return least_loaded if self.in_flight[least_loaded] < self._concurrent else None

    def _queue_to_help(self, url: str) -> deque[Ticket] | None:
        if not self._has_spare(url):
            return None
        return max(self._waiting.values(), key=len)

    def _has_spare(self, url: str) -> bool:
        return 2 * self.in_flight[url] < self._concurrent

    def _grant(self, ticket: Ticket, url: str) -> None:
        self.in_flight[url] += 1
        if self._home_of_trace.get(ticket.trace) not in self._usable:
            self._home_of_trace.put(ticket.trace, url)
            if self._home_of_prompt.get(ticket.prompt) not in self._usable:
                self._home_of_prompt.put(ticket.prompt, url)
        ticket.granted(url)


class _LruMap(Generic[Key]):
    """Keeps the REMEMBERED_KEYS keys that were used last."""

    def __init__(self) -> None:
        self._values: OrderedDict[Key, str] = OrderedDict()

    def get(self, key: Key) -> str | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Key, value: str) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > REMEMBERED_KEYS:
            self._values.popitem(last=False)
