"""Ends this process when another rank is lost, even if its main thread waits in a collective for ever.

Every rank runs two threads. The *communicator* writes the rank's heartbeat to the process group's store each
second and reads the others'; it alone uses its connection, because a call on it blocks while the store's host
is stopped. The *judge* uses nothing but the clock and what the communicator read. Rank 0 reads all heartbeats
and writes the verdict; every other rank reads rank 0's heartbeat and the verdict, so a second of a world of N
costs the store 2 N small messages and one of N values. A rank's known location may be one heartbeat old. No
collective is involved, so the backend does not matter. It was tested over gloo only; under nccl, torch's own
watchdog may abort a process before this one reports.

After a loss, the main thread has a moment to leave by an error of its own; then `os._exit` ends the process,
because nothing else ends one whose main thread is inside a collective.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from threading import Event, Thread, get_ident

import torch.distributed as dist

from megatron_parallel_r1.distributed.heartbeat import (
    Heartbeat,
    HeartbeatMonitor,
    State,
    first_line,
    is_collective_error,
)
from megatron_parallel_r1.errors import LOST_EXIT_CODE, PeerLost

HEARTBEAT_S = 1.0
SUSPECT_TIMEOUT_S = 5.0  # of silence, once a collective has failed or the launcher stops this process
GRACE_S = 2.0  # for the main thread to leave by its own error, which says more
LEAVE_S = 10.0  # for a main thread that is leaving to be gone, whatever it waits for
FAREWELL_S = 4.0  # for others to read the verdict before the store's host takes it along


class Watchdog:
    """Sends this rank's heartbeat and monitors the others', which count as lost after `timeout_s` of silence.
    In a world of one it starts no thread."""

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        if timeout_s < SUSPECT_TIMEOUT_S:
            raise ValueError(
                f"a rank sends a heartbeat every {HEARTBEAT_S:g} s; "
                f"its time-out must be {SUSPECT_TIMEOUT_S:g} s or more"
            )
        self.location = "its start"
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._main = get_ident()
        self._communicator: Thread | None = None
        self._state: State = "here"
        # Each is written once by one thread and read by the others.
        self._own_failure = self._own_verdict = self._failure = self._verdict = ""
        self._disconnected = False
        self._failure_since = self._verdict_since = 0.0
        self._wake, self._judged, self._leaving, self._finished = Event(), Event(), Event(), Event()

    def set_location(self, location: str) -> None:
        """Records where this rank is, such as `stage rl, step 17`; costs one assignment."""
        self.location = location

    def start(self, store: dist.Store, host: str) -> None:
        """Starts to send heartbeats and to monitor.

        Args:
            store: a connection to the process group's store that nobody else uses, empty for this session.
            host: who keeps the store, for messages.
        """
        self._store, self._host = dist.PrefixStore("watchdog", store), host
        self._answered = time.monotonic()
        self._monitor = HeartbeatMonitor(range(self._world_size if self._rank == 0 else 1), self._answered)
        self._communicator = Thread(target=self._communicate, name="heartbeat", daemon=True)
        self._communicator.start()
        Thread(target=self._judge, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Announces that this rank leaves. Rank 0, which usually hosts the store, waits for all others."""
        if self._communicator:
            self._leave()
            self._communicator.join()
            self._finished.set()

    def fail(self, error: BaseException) -> PeerLost | None:
        """Announces that this rank leaves because of `error`.

        Returns:
            For a collective's error, its explanation, to be raised in its place; finding out who is missing
            takes some seconds. None for an error of this rank's own.
        """
        if not self._communicator:
            return None
        self._leaving.set()
        if is_collective_error(error):
            self._own_failure = (
                f"a collective of rank {self._rank} failed in {self.location} ({first_line(error)})"
            )
            self._state = "doubts"
            self._wake.set()
            self._judged.wait(2 * SUSPECT_TIMEOUT_S)
            reason = self._verdict or self._own_failure
        else:
            description = f"{type(error).__name__}: {first_line(error)}"
            self._own_verdict = f"rank {self._rank} left from {self.location} by its own error, {description}"
            reason = ""
        self._leave()
        self._communicator.join(FAREWELL_S + HEARTBEAT_S)
        return PeerLost(self._message(reason)) if reason else None

    def _leave(self) -> None:
        self._state = "left"
        self._wake.set()

    def _message(self, reason: str) -> str:
        return f"rank {self._rank} ({self.location}): {reason}; this process ends"

    # The communicator.

    def _communicate(self) -> None:
        try:
            store = self._store
            keys = ["verdict", "failure", *(f"heartbeat/{rank}" for rank in self._monitor.ranks)]
            for key in keys:
                store.compare_set(key, "", "")  # a read waits for a key that nobody wrote
            count = 0
            while True:
                count, state = count + 1, self._state
                for key, own in (("failure", self._own_failure), ("verdict", self._own_verdict)):
                    if own:
                        store.compare_set(key, "", own)  # the first one stands
                heartbeat = Heartbeat(count, self.location, self._code(), state)
                store.set(f"heartbeat/{self._rank}", heartbeat.pack())
                verdict, failure, *heartbeats = store.multi_get(keys)
                self._update(verdict.decode(), failure.decode(), heartbeats)
                if state == "left" and self._may_go():
                    return
                self._wake.wait(HEARTBEAT_S)
                self._wake.clear()
        except dist.DistError:
            # A rank that is leaving may see the store's host leave before it.
            self._disconnected = self._state != "left"

    def _update(self, verdict: str, failure: str, heartbeats: list[bytes]) -> None:
        now = self._answered = time.monotonic()
        self._monitor.update(heartbeats, now)
        if failure and not self._failure:
            self._failure, self._failure_since = failure, now
        if verdict and not self._verdict:
            self._verdict, self._verdict_since = verdict, now

    def _may_go(self) -> bool:
        if self._rank:
            return True
        now = time.monotonic()
        if self._verdict:
            done = now - self._verdict_since >= FAREWELL_S
            return done or not self._monitor.present(now, 3 * HEARTBEAT_S)
        return len(self._monitor.left()) == self._world_size

    def _code(self) -> str:
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return "the end of its main thread"
        code = frame.f_code
        return f"{code.co_name} ({os.path.basename(code.co_filename)}:{frame.f_lineno})"

    # The judge.

    def _judge(self) -> None:
        while not self._finished.wait(HEARTBEAT_S / 2):
            reason = self._verdict or self._find_loss(time.monotonic())
            if reason:
                self._end(reason)

    def _find_loss(self, now: float) -> str | None:
        # A blocked SIGTERM: the launcher misses a process too, and kills this one 30 s later.
        is_suspect = self._failure or self._own_failure or signal.SIGTERM in signal.sigpending()
        timeout_s = SUSPECT_TIMEOUT_S if is_suspect else self._timeout_s
        last = f"; rank 0 was last in {self._monitor.last(0).location}"
        if self._disconnected:
            return f"{self._host} is gone{last}"
        if now - self._answered >= timeout_s:
            return f"{self._host} has not answered for {now - self._answered:.0f} s{last}"
        if silent := self._monitor.describe_silent(now, timeout_s):
            return silent
        if self._rank == 0 and self._failure and now - self._failure_since >= SUSPECT_TIMEOUT_S:
            return self._monitor.explain_failure(self._failure)
        return None

    def _end(self, reason: str) -> None:
        self._own_verdict = self._verdict = self._verdict or reason
        self._verdict_since = self._verdict_since or time.monotonic()
        self._wake.set()
        self._judged.set()
        if self._leaving.wait(GRACE_S):
            time.sleep(LEAVE_S)  # in a daemon thread: a process that ends in time does not wait for it
        else:
            print(self._message(self._verdict), file=sys.stderr, flush=True)
            self._leave()
            if self._communicator:
                self._communicator.join(FAREWELL_S + HEARTBEAT_S)
        os._exit(LOST_EXIT_CODE)
