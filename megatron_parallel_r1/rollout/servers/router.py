"""Which server a continuation goes to: the one that has its past in the cache, while load allows.

- A trace stays with the server of its first continuation, its home: its forks share a prefix there.
- Traces of one prompt are given the same home, unless that one has more work than the idlest.
- A home that is full is waited for. Only a server with less than half of what it may have helps out.

Nothing waits here; whoever asks is called back when it is its turn.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key")

# Homes that are remembered: traces and prompts of the last few batches. Older ones have left the caches.
REMEMBERED = 65536


@dataclass(eq=False, slots=True)
class Ticket:
    """One continuation that wants a server.

    Attributes:
        trace: its trace's name.
        prompt: what traces with the same beginning have in common.
        granted: called once, with the server's address.
    """

    trace: str
    prompt: int
    granted: Callable[[str], None]


class Placing:
    """Places tickets on at most `concurrent` requests a server.

    Attributes:
        in_flight: requests granted and not done yet, by address.
    """

    def __init__(self, concurrent: int) -> None:
        self.in_flight: Counter[str] = Counter()
        self._concurrent = concurrent
        self._usable: tuple[str, ...] = ()
        self._waiting: dict[str | None, deque[Ticket]] = {None: deque()}
        self._home_of_trace: _Recent[str] = _Recent()
        self._home_of_prompt: _Recent[int] = _Recent()

    @property
    def usable(self) -> tuple[str, ...]:
        return self._usable

    def use(self, urls: Sequence[str]) -> None:
        """From now on these servers; of equally busy ones the earlier first."""
        if tuple(urls) == self._usable:
            return
        self._usable = tuple(urls)
        # Traces under way before new ones, here and in `done`: what they hold in a cache is dear.
        waiting = [ticket for queue in self._waiting.values() for ticket in queue]
        self._waiting = {**{url: deque() for url in urls}, None: deque()}
        for ticket in waiting:
            self.ask(ticket)

    def ask(self, ticket: Ticket) -> None:
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
        """Of one that was not granted yet."""
        for queue in self._waiting.values():
            if ticket in queue:
                queue.remove(ticket)

    def done(self, url: str) -> None:
        """A granted request has ended; its place goes to who waits."""
        self.in_flight[url] -= 1
        while url in self._usable and self.in_flight[url] < self._concurrent:
            queue = self._waiting[url] or self._waiting[None] or self._to_help(url)
            if not queue:
                return
            self._grant(queue.popleft(), url)

    def _with_room(self, ticket: Ticket, home: str | None) -> str | None:
        if not self._usable:
            return None
        idlest = min(self._usable, key=lambda url: self.in_flight[url])
        if home is not None:
            if self.in_flight[home] < self._concurrent:
                return home
            return idlest if self._helps(idlest) else None
        known = self._home_of_prompt.get(ticket.prompt)
        slack = max(2, self._concurrent // 8)
        if known in self._usable and self.in_flight[known] <= self.in_flight[idlest] + slack:
            idlest = known
        return idlest if self.in_flight[idlest] < self._concurrent else None

    def _to_help(self, url: str) -> deque[Ticket] | None:
        if not self._helps(url):
            return None
        return max(self._waiting.values(), key=len)

    def _helps(self, url: str) -> bool:
        return 2 * self.in_flight[url] < self._concurrent

    def _grant(self, ticket: Ticket, url: str) -> None:
        self.in_flight[url] += 1
        if self._home_of_trace.get(ticket.trace) not in self._usable:
            self._home_of_trace.put(ticket.trace, url)
            if self._home_of_prompt.get(ticket.prompt) not in self._usable:
                self._home_of_prompt.put(ticket.prompt, url)
        ticket.granted(url)


class _Recent(Generic[Key]):
    """Remembers the REMEMBERED keys that were used last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, str] = OrderedDict()

    def get(self, key: Key) -> str | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Key, value: str) -> None:
        self._kept[key] = value
        self._kept.move_to_end(key)
        while len(self._kept) > REMEMBERED:
            self._kept.popitem(last=False)
