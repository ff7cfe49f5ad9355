"""Which servers are in step after what happens to them in a publication."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.servers.client import Unreachable
from megatron_parallel_r1.sync.buckets import Bucket
from megatron_parallel_r1.sync.control import RowScores, TokenRow, WeightsInfo
from megatron_parallel_r1.sync.probe import TrainerScores
from megatron_parallel_r1.sync.sender import PassResult, Sender
from megatron_parallel_r1.sync.settings import InFlightPolicy, Sync

A, B = "http://a:1", "http://b:1"
SCORES = [(-1.0, -2.0)]


class Recorder:
    """Stands in for a server's control; notes what it is asked, and is gone where it is told to be."""

    kinds = frozenset({"tensor"})
    wants_head = False

    def __init__(
        self, url: str, fails_at: str = "", scores: Sequence[RowScores] = SCORES, version: int | None = None
    ) -> None:
        self.url, self.fails_at, self.scores, self.version = url, fails_at, scores, version
        self.calls: list[str] = []

    def info(self) -> WeightsInfo:
        self._note("info")
        return WeightsInfo(self.version, 1, "float32")

    def pause(self, in_flight: InFlightPolicy) -> None:
        self._note("pause")

    def continue_generation(self) -> None:
        self._note("continue_generation")

    def score(self, rows: Sequence[TokenRow]) -> Sequence[RowScores]:
        self._note("score")
        return self.scores

    def release_memory(self) -> None:
        self._note("release")

    def resume_memory(self, part: str) -> None:
        self._note(part)

    def _note(self, what: str) -> None:
        self.calls.append(what)
        if what == self.fails_at:
            raise Unreachable(f"{self.url} is gone")


class Scripted:
    """A transport whose passes end as it is told."""

    def __init__(self, *passes: PassResult, breaks: Exception | None = None) -> None:
        self.passes, self.breaks = list(passes), breaks
        self.opened: list[list[str]] = []

    def open(self, servers, infos, version: int) -> None:
        self.opened.append([server.url for server in servers])

    def send(self, bucket: Bucket) -> None:
        if self.breaks:
            raise self.breaks

    def close(self) -> PassResult:
        return self.passes.pop(0)


def publish(sender: Sender) -> tuple[float, list[str]]:
    sender.pause()
    again = True
    while again:
        sender.open(1)
        sender.send(Bucket([], last=True))
        again = sender.close()
    sender.resume_memory("kv_cache")
    sender.continue_generation()
    worst, failed = sender.probe([(1, 2, 3)], TrainerScores(SCORES, None, None, "float32", 2))
    return worst, [server.url for server in failed]


def of(transport: Scripted, *servers: Recorder) -> Sender:
    return Sender(servers, transport, Sync(transport="tensor"))


def test_a_publication_in_order() -> None:
    server = Recorder(A)
    sender = of(Scripted(PassResult({})), server)
    assert publish(sender) == (0.0, [])
    assert server.calls == ["info", "pause", "continue_generation", "score"]
    assert sender.up_to_date == (A,) and not sender.failed


@pytest.mark.parametrize("fails_at", ["info", "pause", "continue_generation", "score"])
def test_one_that_is_gone_is_left_out_with_a_line_in_the_log(
    fails_at: str, caplog: pytest.LogCaptureFixture
) -> None:
    sender = of(Scripted(PassResult({})), Recorder(A), Recorder(B, fails_at))
    with caplog.at_level(logging.WARNING):
        assert publish(sender) == (0.0, [])
    assert sender.up_to_date == (A,) and sender.failed == {B: f"{B} is gone"}
    assert f"{B} is out of date" in caplog.text


def test_one_that_is_back_is_in_step_again() -> None:
    back = Recorder(B, "info")
    sender = of(Scripted(PassResult({}), PassResult({})), Recorder(A), back)
    publish(sender)
    back.fails_at = ""
    publish(sender)
    assert sender.up_to_date == (A, B) and not sender.failed
    assert sender.transport.opened == [[A], [A, B]]


def test_a_server_that_took_a_part_stays_paused() -> None:
    half = Recorder(B)
    sender = of(Scripted(PassResult({B: "load failed"})), Recorder(A), half)
    publish(sender)
    assert sender.up_to_date == (A,) and half.calls == ["info", "pause"]


def test_those_that_are_left_take_all_again() -> None:
    lost, other = Recorder(B), Recorder(A)
    sender = of(Scripted(PassResult({B: "gone"}, again=True), PassResult({})), other, lost)
    publish(sender)
    assert sender.transport.opened == [[A, B], [A]] and sender.up_to_date == (A,)


def test_it_does_not_try_for_ever() -> None:
    sender = of(Scripted(*[PassResult({}, again=True)] * 9), Recorder(A))
    with pytest.raises(UserError, match=r"did not reach http://a:1 in 2 passes by sync.transport tensor"):
        publish(sender)


def test_the_last_one_gone_is_an_error_that_says_why() -> None:
    with pytest.raises(UserError, match=r"no rollout server is left .* http://a:1 is gone"):
        publish(of(Scripted(PassResult({})), Recorder(A, "pause")))


def test_an_error_of_the_sender_waits_for_the_end_of_the_pass() -> None:
    sender = of(Scripted(breaks=OSError("disk full")), Recorder(A))
    sender.pause()
    sender.open(1)
    sender.send(Bucket([], last=False))
    with pytest.raises(OSError, match=r"disk full"):
        sender.close()


def test_a_transport_that_a_server_lacks_is_refused() -> None:
    sender = Sender([Recorder(A)], Scripted(), Sync(transport="distributed"))
    with pytest.raises(
        UserError, match=rf"{A} takes no weights by sync.transport distributed; set it to one of"
    ):
        sender.pause()


def test_other_log_probs_are_told() -> None:
    other = Recorder(B, scores=[(-1.0, -2.5)])
    assert publish(of(Scripted(PassResult({})), Recorder(A), other)) == (0.5, [B])


def test_memory_is_given_back_by_stopped_servers_and_taken_for_weights_first() -> None:
    server = Recorder(A, version=1)
    sender = of(Scripted(PassResult({})), server)
    sender.release_memory()
    sender.release_memory()
    assert server.calls == ["pause", "release"]  # once: asleep it has nothing to release
    publish(sender)
    assert server.calls[2:] == ["info", "weights", "pause", "kv_cache", "continue_generation", "score"]


def test_a_restarted_server_has_all_its_memory() -> None:
    """SGLang ends if it is asked to resume what it has not released."""
    server = Recorder(A, version=1)
    sender = of(Scripted(PassResult({})), server)
    sender.release_memory()
    server.version = None
    publish(sender)
    assert not {"weights", "kv_cache"} & set(server.calls)


def test_a_server_lost_between_its_weights_and_its_cache_resumes_each_once() -> None:
    server = Recorder(B, "kv_cache", version=1)
    sender = of(Scripted(PassResult({}), PassResult({})), Recorder(A), server)
    sender.release_memory()
    publish(sender)
    assert sender.up_to_date == (A,)
    server.fails_at = ""
    publish(sender)
    assert sender.up_to_date == (A, B)
    assert server.calls.count("weights") == 1 and server.calls.count("kv_cache") == 2


def test_a_server_lost_as_it_falls_asleep_is_missed_by_the_next_publication(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Recorder(A, "release", version=1)
    sender = of(Scripted(PassResult({})), server)
    sender.release_memory()
    assert f"{A} is out of date" in caplog.text
    server.fails_at = "info"
    with pytest.raises(UserError, match="no rollout server is left"):
        publish(sender)


def test_servers_may_be_asleep_from_the_start() -> None:
    server = Recorder(A, version=1)
    publish(Sender([server], Scripted(PassResult({})), Sync(transport="tensor"), asleep=True))
    assert server.calls[:2] == ["info", "weights"]
