from __future__ import annotations

import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.formats import Format
from megatron_parallel_r1.rewards.registry import REWARDS, make_reward
from megatron_parallel_r1.rewards.schedule import S2
from megatron_parallel_r1.rewards.terms import score_accuracy

PARALLEL, MALFORMED, SEQUENTIAL = Format(1, 1, 2), Format(1, 0, 1), Format()


def judged(correct: bool, facts: Format) -> Judged:
    return Judged(correct, facts, "42", "text")


@pytest.mark.parametrize(
    ("name", "right_parallel", "right_malformed", "right_sequential", "wrong_parallel", "wrong"),
    [
        ("accuracy", 1.0, 1.0, 1.0, -1.0, -1.0),
        ("s1", 1.0, 1.0, 1.0, -1.0, -1.0),
        ("parallel_bonus", 1.2, 1.0, 1.0, -1.0, -1.0),
        ("accuracy_x_parallel", 1.0, -1.0, -1.0, -1.0, -1.0),
    ],
)
def test_constant_rewards_by_hand(
    name: str,
    right_parallel: float,
    right_malformed: float,
    right_sequential: float,
    wrong_parallel: float,
    wrong: float,
) -> None:
    reward = make_reward(name)
    for step in (0, 9, 1000):
        assert reward(judged(True, PARALLEL), step) == right_parallel
        assert reward(judged(True, MALFORMED), step) == right_malformed
        assert reward(judged(True, SEQUENTIAL), step) == right_sequential
        assert reward(judged(False, PARALLEL), step) == wrong_parallel
        assert reward(judged(False, SEQUENTIAL), step) == wrong
        assert reward.term(step) == ("accuracy" if name == "s1" else name)


def test_s2_at_steps_0_to_20() -> None:
    reward = make_reward("s2")
    plain, bonus = [1.0] * 8, [1.2] * 2
    expected = [*plain, *bonus, *plain, *bonus, 1.0]
    assert [reward(judged(True, PARALLEL), step) for step in range(21)] == expected
    assert [reward(judged(True, MALFORMED), step) for step in range(21)] == [1.0] * 21
    assert [reward(judged(True, SEQUENTIAL), step) for step in range(21)] == [1.0] * 21
    assert [reward(judged(False, PARALLEL), step) for step in range(21)] == [-1.0] * 21
    terms = [*["accuracy"] * 8, *["parallel_bonus"] * 2]
    assert [reward.term(step) for step in range(20)] == terms * 2


def test_s2_with_other_settings() -> None:
    reward = make_reward("s2", {"window": 4, "share": 0.5, "bonus": 1})
    assert [reward(judged(True, PARALLEL), step) for step in range(6)] == [1.0, 1.0, 2.0, 2.0, 1.0, 1.0]
    always, never = S2(share=1.0), S2(share=0.0)
    assert {always(judged(True, PARALLEL), step) for step in range(20)} == {1.2}
    assert {never(judged(True, PARALLEL), step) for step in range(20)} == {1.0}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("acuracy", {}, "'acuracy': unknown, use one of accuracy"),
        ("s2", {"widow": 10}, "no setting 'widow', it has window, share, bonus"),
        ("accuracy", {"bonus": 1.0}, "no setting 'bonus', it has none"),
        ("s2", {"window": "ten"}, "window is 'ten', it must be of type int"),
        ("s2", {"window": True}, "window is True, it must be of type int"),
        ("s2", {"window": 0}, "window 0 and share 0.2"),
        ("s2", {"share": 1.5}, "share 1.5"),
        ("s2", {"window": 7}, "set share to 1/7 = 0.1429"),
    ],
)
def test_a_bad_setting_is_named(name: str, settings: dict[str, int | float | str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        make_reward(name, settings)


def test_each_name_makes_a_reward_that_compares_by_its_settings() -> None:
    for name in REWARDS:
        assert make_reward(name) == make_reward(name, {})


def test_evaluation_scores_plain_accuracy() -> None:
    for facts in (PARALLEL, MALFORMED, SEQUENTIAL):
        assert score_accuracy(judged(True, facts)) == 1.0
        assert score_accuracy(judged(False, facts)) == 0.0
