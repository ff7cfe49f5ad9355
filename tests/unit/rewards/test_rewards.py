from __future__ import annotations

import math
import re
from itertools import product
from pathlib import Path

import pytest

from megatron_parallel_r1.config.stages import RewardSource
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.base import Component, Judged, Reward, Score, reward_metrics
from megatron_parallel_r1.rewards.format_check import Format
from megatron_parallel_r1.rewards.registry import (
    REWARDS,
    TERMS,
    Accuracy,
    Diversity,
    Length,
    WellFormedParallel,
    make_component,
    make_reward,
    score_accuracy,
)
from megatron_parallel_r1.rewards.schedule import Constant, Linear, Window

PARALLEL, MALFORMED, SEQUENTIAL = Format(1, 1, 2), Format(1, 0, 1), Format()


def judged(correct: bool, facts: Format = SEQUENTIAL, **other: int | float) -> Judged:
    return Judged(correct, facts, "42", "text", **other)


def test_p_grpo_by_hand() -> None:
    # 1 - 90 / 100 = 0.1 off the critical path: 1 + 0.5 * 0.1; above the cap: 1 + 0.5 * 0.2; wrong: nothing.
    reward = make_reward("p_grpo")
    assert reward(judged(True, length=100, critical_length=90), 0) == pytest.approx(1.05)
    assert reward(judged(True, length=100, critical_length=50), 0) == pytest.approx(1.1)
    assert reward(judged(True, length=100, critical_length=100), 0) == 1.0
    assert reward(judged(False, length=100, critical_length=50), 0) == 0.0
    steep = make_reward("p_grpo", {"factor": 2.0, "cap": 0.4})
    assert steep(judged(True, length=100, critical_length=50), 0) == pytest.approx(1.8)
    with pytest.raises(UserError, match="set factor >= 0 and 0 <= cap <= 1"):
        make_reward("p_grpo", {"cap": 1.5})


@pytest.mark.parametrize(
    ("name", "right_parallel", "right_malformed", "right_sequential", "wrong_parallel", "wrong"),
    [
        ("accuracy", 1.0, 1.0, 1.0, -1.0, -1.0),
        ("s1", 1.0, 1.0, 1.0, -1.0, -1.0),
        ("parallel_bonus", 1.2, 1.0, 1.0, -1.0, -1.0),
        ("parallel", 1.0, 0.0, 0.0, 0.0, 0.0),
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


@pytest.mark.parametrize(
    ("settings", "correct", "difference", "value"),
    [
        ({}, True, 0.75, 0.75),
        ({}, True, None, 0.0),
        ({}, False, 0.75, 0.0),
        ({"only_right": False}, False, 0.75, 0.75),
    ],
)
def test_diversity(settings: dict[str, bool], correct: bool, difference: float | None, value: float) -> None:
    assert make_reward("diversity", settings)(judged(correct, difference=difference), 0) == value


@pytest.mark.parametrize(
    ("tokens", "cost"), [(0, 0.0), (2000, 0.0), (2250, -0.25), (2999, -0.999), (3000, -1.0), (9000, -1.0)]
)
def test_length_is_the_soft_over_long_punishment(tokens: int, cost: float) -> None:
    total, critical = Length(2000, 3000), Length(2000, 3000, "critical")
    assert total(judged(True, length=tokens, critical_length=7), 0) == cost
    assert critical(judged(True, length=9000, critical_length=tokens), 0) == cost


def test_weights_by_hand() -> None:
    assert [Constant(value=0.5).at(step) for step in (0, 1, 99)] == [0.5, 0.5, 0.5]
    falling = Linear(start=1.0, end=0.0, steps=4, begin=2)
    assert [falling.at(step) for step in range(8)] == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert (
        Linear(start=0.1, end=0.3, steps=7).at(7) == 0.3 and Linear(start=0.1, end=0.3, steps=7).at(0) == 0.1
    )  # both ends exactly
    assert [Window(window=4, share=0.5, bonus=2.0).at(step) for step in range(6)] == [
        0.0,
        0.0,
        2.0,
        2.0,
        0.0,
        0.0,
    ]


def test_s2_at_steps_0_to_20() -> None:
    reward = make_reward("s2")
    plain, bonus = [1.0] * 8, [1.2] * 2
    expected = [*plain, *bonus, *plain, *bonus, 1.0]
    assert [reward(judged(True, PARALLEL), step) for step in range(21)] == expected
    assert [reward(judged(True, MALFORMED), step) for step in range(21)] == [1.0] * 21
    assert [reward(judged(True, SEQUENTIAL), step) for step in range(21)] == [1.0] * 21
    assert [reward(judged(False, PARALLEL), step) for step in range(21)] == [-1.0] * 21
    terms = [*["accuracy"] * 8, *["accuracy+parallel_bonus"] * 2]
    assert [reward.term(step) for step in range(20)] == terms * 2


def test_s2_with_other_settings() -> None:
    reward = make_reward("s2", {"window": 4, "share": 0.5, "bonus": 1})
    assert [reward(judged(True, PARALLEL), step) for step in range(6)] == [1.0, 1.0, 2.0, 2.0, 1.0, 1.0]
    always, never = make_reward("s2", {"share": 1.0}), make_reward("s2", {"share": 0.0})
    assert {always(judged(True, PARALLEL), step) for step in range(20)} == {1.2}
    assert {never(judged(True, PARALLEL), step) for step in range(20)} == {1.0}


def test_a_number_that_yaml_reads_as_text() -> None:
    assert make_reward("s2", {"bonus": "1e-1"}) == make_reward("s2", {"bonus": 0.1})
    source = RewardSource.model_validate({"components": [{"term": "accuracy", "weight": "1e-1"}]})
    assert source.make()(judged(True), 0) == 0.1


def test_s2_spelled_as_components_is_s2() -> None:
    spelled = Reward(
        (
            make_component("accuracy"),
            make_component("parallel", weight=Window(window=10, share=0.2, bonus=0.2), name="bonus"),
        )
    )
    for correct, facts, step in product((True, False), (PARALLEL, MALFORMED, SEQUENTIAL), range(30)):
        assert spelled(judged(correct, facts), step) == make_reward("s2")(judged(correct, facts), step)


MIX = Reward(
    (
        Component("accuracy", Accuracy()),
        Component("bonus", WellFormedParallel(), Window(window=2, share=0.5, bonus=0.5)),
        Component("diversity", Diversity(), Linear(start=0.4, end=0.0, steps=4)),
        Component("length", Length(0, 100), Constant(value=0.5)),
    )
)


@pytest.mark.parametrize(
    ("step", "parts"),
    [
        (0, {"accuracy": 1.0, "bonus": 0.0, "diversity": 0.2, "length": -0.25}),
        (1, {"accuracy": 1.0, "bonus": 0.5, "diversity": 0.15, "length": -0.25}),
        (4, {"accuracy": 1.0, "bonus": 0.0, "diversity": 0.0, "length": -0.25}),
    ],
)
def test_a_mix_by_hand(step: int, parts: dict[str, float]) -> None:
    score = MIX.score(judged(True, PARALLEL, difference=0.5, length=50), step)
    assert score.parts == pytest.approx(parts, rel=1e-12)  # three roundings of a double
    assert score.total == sum(score.parts.values())


def test_what_is_in_force_has_a_name() -> None:
    assert [MIX.term(step) for step in (0, 1, 4)] == [
        "accuracy+diversity+length",
        "accuracy+bonus+diversity+length",
        "accuracy+length",
    ]


def test_metrics_by_component_add_up() -> None:
    scores = [Score(1.5, {"a": 1.0, "b": 0.5}), Score(-1.0, {"a": -1.0, "b": 0.0})]
    assert reward_metrics(scores) == {"reward": 0.25, "reward_a": 0.0, "reward_b": 0.25}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("acuracy", {}, "'acuracy': unknown, use one of accuracy"),
        ("s2", {"widow": 10}, "no setting 'widow', it has window, share, bonus"),
        ("accuracy", {"bonus": 1.0}, "no setting 'bonus', it has none"),
        ("s2", {"window": "ten"}, "window is 'ten', it must be of type int"),
        ("s2", {"window": True}, "window is True, it must be of type int"),
        ("s2", {"window": 0}, "reward s2: window: Input should be greater than or equal to 1 (given 0)"),
        ("s2", {"share": 1.5}, "reward s2: share: Input should be less than or equal to 1 (given 1.5)"),
        ("s2", {"window": 7}, "set share to 1/7 = 0.1429"),
        ("s2", {"bonus": math.inf}, "reward s2: bonus is inf, it must be finite"),
        ("parallel_bonus", {"bonus": math.nan}, "reward parallel_bonus: bonus is nan, it must be finite"),
        ("length", {"free": 5, "limit": 5}, "reward length: free 5 and limit 5; set 0 <= free < limit"),
        ("length", {"measure": "words"}, "measure 'words'; use one of total, critical"),
    ],
)
def test_a_bad_setting_is_named(name: str, settings: dict[str, int | float | str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make_reward(name, settings)


def test_a_bad_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps\n.*greater than or equal to 1"):
        Linear(start=1.0, end=0.0, steps=0)
    with pytest.raises(ValueError, match="finite number"):
        Constant(value=math.nan)


def test_components_need_names_of_their_own() -> None:
    with pytest.raises(UserError, match="it has no components"):
        Reward(())
    with pytest.raises(UserError, match="two components are called accuracy"):
        Reward((make_component("accuracy"), make_component("accuracy", weight=Constant(value=2.0))))


def test_each_name_makes_a_reward_that_compares_by_its_settings() -> None:
    for name in REWARDS:
        assert make_reward(name) == make_reward(name, {})
    assert make_reward("s2") != make_reward("s2", {"bonus": 0.3})
    assert set(TERMS) < set(REWARDS)


def test_evaluation_scores_plain_accuracy() -> None:
    for facts in (PARALLEL, MALFORMED, SEQUENTIAL):
        assert score_accuracy(judged(True, facts)) == 1.0
        assert score_accuracy(judged(False, facts)) == 0.0


OWN = """
import {imports}

def brief(judged, step):
    return 1.0 / (step + len(judged.text))

def words(judged, step):
    return "many"

def endless(judged, step):
    return float("nan")

def narrow(judged):
    return 1.0

LIMIT = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules in the working directory, which is not on the path."""
    (tmp_path / "own_rewards.py").write_text(OWN.format(imports="math"))
    (tmp_path / "own_broken.py").write_text(OWN.format(imports="no_such_module"))
    (tmp_path / "own_unreadable.py").write_text("def brief(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])


@pytest.mark.usefixtures("own")
def test_a_function_of_the_user() -> None:
    trace = Judged(True, PARALLEL, "42", "text", text="four")
    reward = make_reward("own_rewards:brief")
    assert reward(trace, 4) == 0.125 and reward.term(0) == "brief"
    mixed = Reward(
        (make_component("accuracy"), make_component("own_rewards:brief", None, Constant(value=8.0), "b"))
    )
    assert mixed.score(trace, 0) == Score(3.0, {"accuracy": 1.0, "b": 2.0})


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":brief", "write module:function"),
        ("own_rewards:", "write module:function"),
        ("own_nothing:f", "cannot import own_nothing (ModuleNotFoundError: No module named 'own_nothing')"),
        (
            "own_broken:brief",
            "cannot import own_broken (ModuleNotFoundError: No module named 'no_such_module')",
        ),
        ("own_unreadable:brief", "cannot import own_unreadable (SyntaxError"),
        ("own_rewards:briefer", "own_rewards has nothing called briefer"),
        ("own_rewards:LIMIT", "own_rewards has no function called LIMIT"),
        ("own_rewards:narrow", "it cannot be called as narrow(judged, step)"),
        (".own_rewards:brief", "cannot import .own_rewards (TypeError"),
    ],
)
def test_a_function_that_cannot_serve(name: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        make_reward(name)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("own")
def test_a_function_that_returns_no_number_or_is_given_settings() -> None:
    for name, value in (("words", "'many'"), ("endless", "nan")):
        message = f"own_rewards:{name}, step 1, trace 0: it returned {value}; return a finite number"
        with pytest.raises(UserError, match=message):
            make_reward(f"own_rewards:{name}")(judged(True), 0)
    with pytest.raises(UserError, match="a function takes no settings"):
        make_reward("own_rewards:brief", {"limit": 3})
