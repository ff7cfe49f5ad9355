"""The router: bounds, stickiness, no ticket forgotten."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_parallel_r1.rollout.servers.router import CacheAwareRouter, Ticket


class Recorder:
    """Submits tickets and records where each went."""

    def __init__(self, router: CacheAwareRouter) -> None:
        self.router = router
        self.went: dict[int, str] = {}
        self.submitted = 0

    def submit(self, trace: str, prompt: int = 0) -> str | None:
        """Where it went at once; None: it waits."""
        number, self.submitted = self.submitted, self.submitted + 1

        def granted(url: str) -> None:
            assert number not in self.went, "granted twice"
            self.went[number] = url

        self.router.submit(Ticket(trace, prompt, granted))
        return self.went.get(number)


def of(concurrent: int, *urls: str) -> Recorder:
    router = CacheAwareRouter(concurrent)
    router.set_usable(urls)
    return Recorder(router)


def test_a_trace_stays_where_it_began_and_others_spread() -> None:
    recorder = of(100, "a", "b")
    homes = {trace: recorder.submit(trace, prompt=int(trace)) for trace in "012345"}
    assert sorted(homes.values()) == ["a"] * 3 + ["b"] * 3
    for trace, home in homes.items():
        assert [recorder.submit(trace, prompt=7) for _ in range(4)] == [home] * 4


def test_traces_of_a_prompt_meet_until_their_server_has_more_work() -> None:
    recorder = of(16, "a", "b")
    # 16 // 8 = 2 requests more than the idlest is still the same load.
    assert [recorder.submit(str(trace), prompt=5) for trace in range(5)] == ["a", "a", "a", "b", "a"]


def test_a_full_home_is_waited_for_while_others_have_work() -> None:
    recorder = of(2, "a", "b")
    assert [recorder.submit("x", 1), recorder.submit("x", 2), recorder.submit("y", 3)] == ["a", "a", "b"]
    assert recorder.submit("x", 4) is None
    recorder.router.release("a")
    assert recorder.went[3] == "a"


def test_an_idle_server_helps_a_full_one() -> None:
    recorder = of(2, "a", "b")
    assert [recorder.submit("x", 1), recorder.submit("x", 2), recorder.submit("x", 3)] == ["a", "a", "b"]
    assert recorder.submit("x", 4) is None, "half of b is taken"
    recorder.router.release("b")
    assert recorder.went[3] == "b"
    recorder.router.release("a")
    assert recorder.submit("x", 5) == "a", "helping does not move a home"


def test_the_waiting_go_to_who_joins_and_leave_who_leaves() -> None:
    recorder = of(1, "a")
    assert [recorder.submit("x", 1), recorder.submit("x", 2), recorder.submit("y", 3)] == ["a", None, None]
    recorder.router.set_usable(("b", "c"))
    assert recorder.went == {0: "a", 1: "b", 2: "c"}
    recorder.router.release("a")
    assert recorder.submit("x", 4) is None, "x lives at b now, which is full; c has its one request too"


@settings(deadline=None)
@given(st.data())
def test_nobody_is_forgotten_and_no_server_overfilled(data: st.DataObject) -> None:
    concurrent = data.draw(st.integers(1, 4))
    recorder = of(concurrent, "a", "b")
    gone: set[int] = set()
    for _ in range(data.draw(st.integers(1, 60))):
        kind = data.draw(st.sampled_from(["ask", "ask", "done", "use"]))
        under_way = [number for number in recorder.went if number not in gone]
        if kind == "ask":
            recorder.submit(data.draw(st.sampled_from("uvwxyz")), data.draw(st.integers(0, 3)))
        elif kind == "done" and under_way:
            number = data.draw(st.sampled_from(under_way))
            gone.add(number)
            recorder.router.release(recorder.went[number])
        elif kind == "use":
            recorder.router.set_usable(data.draw(st.lists(st.sampled_from("abcd"), unique=True)))
        busy = [recorder.went[number] for number in recorder.went if number not in gone]
        for url in "abcd":
            assert recorder.router.in_flight[url] == busy.count(url) <= concurrent
    recorder.router.set_usable(("a",))
    finished = set()
    while open_ := [number for number in recorder.went if number not in gone | finished]:
        finished.add(open_[0])
        recorder.router.release(recorder.went[open_[0]])
    assert len(recorder.went) == recorder.submitted, "some wait, and nothing is under way"
