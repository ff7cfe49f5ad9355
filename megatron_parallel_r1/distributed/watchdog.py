"""Ends this process when another rank is gone, though its main thread may wait in a collective for ever.

Every rank has two threads. The *talker* writes the rank's beat to the process group's store each second and
reads what others wrote; it alone touches its connection, for a call on it blocks for as long as the store's
host is stopped. The *judge* touches nothing but the clock and what the talker heard. Rank 0 reads all beats
and writes the verdict; every other rank reads rank 0's beat and the verdict, so that a second of a world of N
costs the store 2 N small messages and one of N values. What is known of a rank's place is up to a beat old.
No collective is involved, so the backend does not matter. It was run over gloo alone; under nccl, torch's own
watchdog may abort a process before this one speaks.

Whoever is told of a loss has a moment to leave by an error of its own; then `os._exit` ends it, because
nothing else ends a process whose main thread is inside a collective.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from threading import Event, Thread, get_ident

import torch.distributed as dist

from megatron_parallel_r1.distributed.heartbeat import Beat, Heard, failed_collective, first_line
from megatron_parallel_r1.errors import LOST_EXIT_CODE, PeerLost

BEAT_S = 1.0
PATIENCE_S = 5.0  # a silence of so many beats convicts once a collective has failed, or a launcher ends us
GRACE_S = 2.0  # for the main thread to leave by its own error, which says more
LEAVE_S = 10.0  # for a main thread that is leaving to be gone, whatever it waits for
FAREWELL_S = 4.0  # for others to read the verdict before the store's host takes it along


class Watch:
    """This rank's beat, and its ear for the others'. In a world of one nobody begins it: no thread."""

    def __init__(self, rank: int, world: int, timeout_s: float) -> None:
        """
        Args:
            timeout_s: silence after which a rank counts as gone.
        """
        if timeout_s < PATIENCE_S:
            raise ValueError(
                f"a rank beats every {BEAT_S:g} s; its time-out must be {PATIENCE_S:g} s or more"
            )
        self.place = "its start"
        self._rank, self._world, self._timeout_s = rank, world, timeout_s
        self._main = get_ident()
        self._talker: Thread | None = None
        self._state = "here"
        # Written once by one thread and read by the others.
        self._own_doubt = self._own_verdict = self._doubt = self._verdict = ""
        self._cut = False
        self._doubt_since = self._verdict_since = 0.0
        self._wake, self._told, self._leaving, self._finished = Event(), Event(), Event(), Event()

    def at(self, place: str) -> None:
        """Says where this rank is, such as `stage rl, step 17`; costs an assignment."""
        self.place = place

    def begin(self, own: dist.Store, host: str) -> None:
        """Starts to beat and to listen.

        Args:
            own: a connection to the process group's store that nobody else uses; empty but for this session.
            host: who keeps the store, for messages.
        """
        self._own, self._host = own, host
        self._answered = time.monotonic()
        self._heard = Heard(range(self._world if self._rank == 0 else 1), self._answered)
        self._talker = Thread(target=self._talk, name="beat", daemon=True)
        self._talker.start()
        Thread(target=self._listen, name="judge", daemon=True).start()

    def close(self) -> None:
        """Says farewell. Rank 0, which hosts the store as a rule, stays until every rank has said so."""
        if self._talker:
            self._leave()
            self._talker.join()
            self._finished.set()

    def fail(self, error: BaseException) -> PeerLost | None:
        """Tells the others that this rank leaves because of `error`.

        Returns:
            If `error` is a collective's, what explains it, to be raised in its place; to hear who is missing
            takes some seconds. None for an error of this rank's own.
        """
        if not self._talker:
            return None
        self._leaving.set()
        if failed_collective(error):
            self._own_doubt = (
                f"a collective of rank {self._rank} failed in {self.place} ({first_line(error)})"
            )
            self._state = "doubts"
            self._wake.set()
            self._told.wait(2 * PATIENCE_S)
            why = self._verdict or self._own_doubt
        else:
            said = f"{type(error).__name__}: {first_line(error)}"
            self._own_verdict = f"rank {self._rank} left from {self.place} by its own error, {said}"
            why = ""
        self._leave()
        self._talker.join(FAREWELL_S + BEAT_S)
        return PeerLost(self._line(why)) if why else None

    def _leave(self) -> None:
        self._state = "left"
        self._wake.set()

    def _line(self, why: str) -> str:
        return f"rank {self._rank} ({self.place}): {why}; this process ends"

    # The talker.

    def _talk(self) -> None:
        try:
            store = dist.PrefixStore("watch", self._own)
            keys = ["verdict", "doubt", *(f"beat/{rank}" for rank in self._heard.ranks)]
            for key in keys:
                store.compare_set(key, "", "")  # a read waits for a key that nobody wrote
            count = 0
            while True:
                count, state = count + 1, self._state
                for key, own in (("doubt", self._own_doubt), ("verdict", self._own_verdict)):
                    if own:
                        store.compare_set(key, "", own)  # the first one stands
                store.set(f"beat/{self._rank}", Beat(count, self.place, self._code(), state).pack())
                verdict, doubt, *beats = store.multi_get(keys)
                self._take(verdict.decode(), doubt.decode(), beats)
                if state == "left" and self._may_go():
                    return
                self._wake.wait(BEAT_S)
                self._wake.clear()
        except dist.DistError:
            # Whoever is leaving may see the host of the store leave before it.
            self._cut = self._state != "left"

    def _take(self, verdict: str, doubt: str, beats: list[bytes]) -> None:
        now = self._answered = time.monotonic()
        self._heard.hear(beats, now)
        if doubt and not self._doubt:
            self._doubt, self._doubt_since = doubt, now
        if verdict and not self._verdict:
            self._verdict, self._verdict_since = verdict, now

    def _may_go(self) -> bool:
        if self._rank:
            return True
        now = time.monotonic()
        if self._verdict:
            return now - self._verdict_since >= FAREWELL_S or not self._heard.present(now, 3 * BEAT_S)
        return len(self._heard.left()) == self._world

    def _code(self) -> str:
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return "the end of its main thread"
        code = frame.f_code
        return f"{code.co_name} ({os.path.basename(code.co_filename)}:{frame.f_lineno})"

    # The judge.

    def _listen(self) -> None:
        while not self._finished.wait(BEAT_S / 2):
            why = self._verdict or self._judged(time.monotonic())
            if why:
                self._end(why)

    def _judged(self, now: float) -> str | None:
        # A held SIGTERM: torchrun misses a process too, and ends this one half a minute later.
        is_late = self._doubt or self._own_doubt or signal.SIGTERM in signal.sigpending()
        patience = PATIENCE_S if is_late else self._timeout_s
        last = f"; rank 0 was last in {self._heard.beat(0).place}"
        if self._cut:
            return f"{self._host} is gone{last}"
        if now - self._answered >= patience:
            return f"{self._host} has not answered for {now - self._answered:.0f} s{last}"
        if silent := self._heard.silent(now, patience):
            return silent
        if self._rank == 0 and self._doubt and now - self._doubt_since >= PATIENCE_S:
            return self._heard.astray(self._doubt)
        return None

    def _end(self, why: str) -> None:
        self._own_verdict = self._verdict = self._verdict or why
        self._verdict_since = self._verdict_since or time.monotonic()
        self._wake.set()
        self._told.set()
        if self._leaving.wait(GRACE_S):
            time.sleep(LEAVE_S)  # in a daemon thread: a process that ends in time does not wait for it
        else:
            print(self._line(self._verdict), file=sys.stderr, flush=True)
            self._leave()
            self._talker.join(FAREWELL_S + BEAT_S)
        os._exit(LOST_EXIT_CODE)
