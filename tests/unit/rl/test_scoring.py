"""What a user's reward sees of a trace; traces without a reward in a batch, a group and a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_parallel_r1.config.objective import DynamicSampling
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.base import BlockText, Judged, JudgedTrace, Score
from megatron_parallel_r1.rewards.format_check import Format
from megatron_parallel_r1.rewards.registry import make_reward
from megatron_parallel_r1.rl.objective.advantage import informative, scored_advantages
from megatron_parallel_r1.rl.pending import from_json, to_json
from megatron_parallel_r1.rl.rollout_batch import RolloutBatch
from megatron_parallel_r1.rl.scoring import judged_trace
from tests.unit.rl.test_path_results import WORDS, trace
from tests.unit.rl.test_rollout_worker import FakeSampling, trained

OWN = "tests.unit.rl.test_scoring"
SEEN: list[tuple[str, int]] = []


def of_problem(judged: JudgedTrace, step: int) -> float | None:
    """No signal on problem 1, and on the wrong traces of problem 0."""
    SEEN.append((judged.question, step))
    if judged.question == "problem 1" or (judged.question == "problem 0" and not judged.correct):
        return None
    return 1.0 if judged.correct else -1.0


def silent(judged: JudgedTrace, step: int) -> None:
    return None


def test_a_trace_as_a_reward_sees_it() -> None:
    written = "so P p is 4 P p x /p /P S y /S /p p of 5 and 6 /p /P S it is 5 /S Final Answer: 5 $"
    judged = Judged(True, Format(), "5", "text", text="so Final Answer: 5", length=29)
    problem = Problem("7", "2 + 3 = ?", ("5",), "test", columns={"level": 3, "question": "2 + 3 = ?"})
    cut = replace(trace(written), finish="length")
    found = judged_trace(judged, cut, problem, WORDS)
    same = {name: getattr(found, name) for name in Judged.__slots__}
    assert Judged(**same) == judged
    assert (found.question, found.references, found.finish) == ("2 + 3 = ?", (), "length")
    assert found.response == "so is 4 x y of 5 and 6 it is 5 Final Answer: 5"
    assert found.tokens == cut.tokens and found.columns == {"level": 3, "question": "2 + 3 = ?"}
    # The tags of a nested block are tokens of the path that it is in.
    assert found.blocks == (
        BlockText(("is 4 x y", "of 5 and 6"), (10, 4), "it is 5", 3),
        BlockText(("x",), (1,), "y", 1),
    )
    open_end = judged_trace(judged, trace("P p is /p p of"), problem, WORDS)
    assert open_end.blocks == (BlockText(("is", "of"), (1, 1), None, 0),)


@pytest.mark.usefixtures("world")
def test_each_trace_is_scored_once_and_unscored_ones_teach_nothing() -> None:
    SEEN.clear()
    fake = FakeSampling(mixed={0, 1, 2, 3})
    fake.reward = make_reward(f"{OWN}:of_problem")
    batch = fake.next_batch(DynamicSampling(max_rounds=3))
    # Problem 0 has one scored trace, problem 1 none: neither group differs.
    assert trained(batch) == [2, 3] and len(SEEN) == len(batch.all)
    assert sorted(SEEN) == sorted((problem.prompt, 0) for problem in batch.all.problems)
    assert batch.all.rewards[:6] == [1.0, None, None, None, 1.0, -1.0]
    held = from_json(json.loads(json.dumps(to_json(batch))))
    assert held == batch and isinstance(held, RolloutBatch)


@pytest.mark.usefixtures("world")
def test_a_step_without_any_reward_ends_the_run(tmp_path) -> None:
    fake = FakeSampling(mixed={0})
    fake.reward, fake.folder = make_reward(f"{OWN}:silent"), tmp_path
    with pytest.raises(UserError, match=r"stage rl, step 1: no trace has a reward.*unscored_traces.jsonl"):
        fake.next_batch(None)
    assert len((tmp_path / "unscored_traces.jsonl").read_text().splitlines()) == 6


def test_groups_with_unscored_traces_by_hand() -> None:
    nan = np.nan
    rewards_PG = np.array([[1.0, nan, -1.0], [1.0, nan, 1.0], [nan, nan, 1.0], [nan] * 3])
    assert informative(rewards_PG).tolist() == [True, False, False, False]
    advantages_PG = scored_advantages("dr_grpo", rewards_PG, np.isnan(rewards_PG))
    assert np.ma.getmaskarray(advantages_PG).tolist() == np.isnan(rewards_PG).tolist()
    assert advantages_PG.filled(9.0).tolist() == [[1, 9, -1], [0, 9, 0], [9, 9, 0], [9, 9, 9]]
    # Whole groups come together, whatever another group lacks.
    over_the_step = "tests.unit.rl.own_objective:over_the_step"
    rewards_PG = np.array([[1.0, 3.0], [5.0, 7.0], [nan, 2.0]])
    advantages_PG = scored_advantages(over_the_step, rewards_PG, np.isnan(rewards_PG))
    assert advantages_PG.filled(9.0).tolist() == [[-3, -1], [1, 3], [9, 0]]
    whole_PG = np.array([[1.0, 0.0], [2.0, -1.0]])
    assert type(scored_advantages("grpo", whole_PG, np.isnan(whole_PG))) is np.ndarray


def test_the_score_of_parts() -> None:
    assert Score.of({"a": 1.0, "b": 0.5}) == Score(1.5, {"a": 1.0, "b": 0.5})
    assert Score.of({"a": 1.0, "b": None}) == Score(None, {"a": 1.0, "b": None})
