"""Placing: bounds, stickiness, nobody forgotten."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_parallel_r1.rollout.servers.router import Placing, Ticket


class Asker:
    """Asks, and notes where each ticket went."""

    def __init__(self, placing: Placing) -> None:
        self.placing = placing
        self.went: dict[int, str] = {}
        self.asked = 0

    def ask(self, trace: str, prompt: int = 0) -> str | None:
        """Where it went at once; None: it waits."""
        number, self.asked = self.asked, self.asked + 1

        def granted(url: str) -> None:
            assert number not in self.went, "granted twice"
            self.went[number] = url

        self.placing.ask(Ticket(trace, prompt, granted))
        return self.went.get(number)


def of(concurrent: int, *urls: str) -> Asker:
    placing = Placing(concurrent)
    placing.use(urls)
    return Asker(placing)


def test_a_trace_stays_where_it_began_and_others_spread() -> None:
    asker = of(100, "a", "b")
    homes = {trace: asker.ask(trace, prompt=int(trace)) for trace in "012345"}
    assert sorted(homes.values()) == ["a"] * 3 + ["b"] * 3
    for trace, home in homes.items():
        assert [asker.ask(trace, prompt=7) for _ in range(4)] == [home] * 4


def test_traces_of_a_prompt_meet_until_their_server_has_more_work() -> None:
    asker = of(16, "a", "b")
    # 16 // 8 = 2 requests more than the idlest is still the same load.
    assert [asker.ask(str(trace), prompt=5) for trace in range(5)] == ["a", "a", "a", "b", "a"]


def test_a_full_home_is_waited_for_while_others_have_work() -> None:
    asker = of(2, "a", "b")
    assert [asker.ask("x", 1), asker.ask("x", 2), asker.ask("y", 3)] == ["a", "a", "b"]
    assert asker.ask("x", 4) is None
    asker.placing.done("a")
    assert asker.went[3] == "a"


def test_an_idle_server_helps_a_full_one() -> None:
    asker = of(2, "a", "b")
    assert [asker.ask("x", 1), asker.ask("x", 2), asker.ask("x", 3)] == ["a", "a", "b"]
    assert asker.ask("x", 4) is None, "half of b is taken"
    asker.placing.done("b")
    assert asker.went[3] == "b"
    asker.placing.done("a")
    assert asker.ask("x", 5) == "a", "helping does not move a home"


def test_the_waiting_go_to_who_joins_and_leave_who_leaves() -> None:
    asker = of(1, "a")
    assert [asker.ask("x", 1), asker.ask("x", 2), asker.ask("y", 3)] == ["a", None, None]
    asker.placing.use(("b", "c"))
    assert asker.went == {0: "a", 1: "b", 2: "c"}
    asker.placing.done("a")
    assert asker.ask("x", 4) is None, "x lives at b now, which is full; c has its one request too"


@settings(deadline=None)
@given(st.data())
def test_nobody_is_forgotten_and_no_server_overfilled(data: st.DataObject) -> None:
    concurrent = data.draw(st.integers(1, 4))
    asker = of(concurrent, "a", "b")
    gone: set[int] = set()
    for _ in range(data.draw(st.integers(1, 60))):
        kind = data.draw(st.sampled_from(["ask", "ask", "done", "use"]))
        under_way = [number for number in asker.went if number not in gone]
        if kind == "ask":
            asker.ask(data.draw(st.sampled_from("uvwxyz")), data.draw(st.integers(0, 3)))
        elif kind == "done" and under_way:
            number = data.draw(st.sampled_from(under_way))
            gone.add(number)
            asker.placing.done(asker.went[number])
        elif kind == "use":
            asker.placing.use(data.draw(st.lists(st.sampled_from("abcd"), unique=True)))
        busy = [asker.went[number] for number in asker.went if number not in gone]
        for url in "abcd":
            assert asker.placing.in_flight[url] == busy.count(url) <= concurrent
    asker.placing.use(("a",))
    finished = set()
    while open_ := [number for number in asker.went if number not in gone | finished]:
        finished.add(open_[0])
        asker.placing.done(asker.went[open_[0]])
    assert len(asker.went) == asker.asked, "some wait, and nothing is under way"
