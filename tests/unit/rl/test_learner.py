"""From traces and rewards to an update: what of the objective reaches which token."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_parallel_r1.config.objective import Objective
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import hf_tensors, load_hf_tensors
from megatron_parallel_r1.rl.learner import BatchConfig, Learner
from megatron_parallel_r1.rl.reference import Reference
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.train.trainer import Trainer
from tests.reference.traces import TAGS
from tests.unit.rl.steps import learn
from tests.unit.rollout.tiny import native_engine, random_prompts, tiny_qwen3, traces_of

SAMPLES = 4
THINKING = Thinking(paths=3, max_path_tokens=10, max_response_tokens=60)
REWARDS = [1.0, -1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0]


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    prompts = [prompt for prompt in random_prompts(2) for _ in range(SAMPLES)]
    return traces_of(native_engine(tiny_qwen3()), THINKING, prompts)


def learner(trainer: Trainer, objective: Objective, updates: int = 1, **changed: object) -> Learner:
    batch = BatchConfig(
        SAMPLES, 1, updates, micro_tokens=200, max_response_tokens=THINKING.max_response_tokens
    )
    return Learner(trainer, objective, batch, "isolated", TAGS, **changed)


def reference_of(trainer: Trainer, every: int = 0) -> Reference:
    model = build_model(trainer.model.architecture)
    load_hf_tensors(model, hf_tensors(trainer.model))
    return Reference(model, 1.0, every)


def values_of(
    learner: Learner, traces: Sequence[Trace], rewards: Sequence[float | None]
) -> dict[str, np.ndarray]:
    """What each target was given in the last update, all together, and the number of its `trace`."""
    seen: list[dict[str, torch.Tensor]] = []
    update = learner.trainer.update

    def spy(batches, loss, lr):
        for batch in batches:
            seen.append(
                batch.values | {"trace": torch.tensor(batch.row.segment_ids)[batch.segments.segment_N]}
            )
        return update(batches, loss, lr)

    learner.trainer.update = spy  # type: ignore[method-assign]
    learn(learner, traces, rewards, lr=1e-3)
    return {name: np.concatenate([v[name].numpy() for v in seen]) for name in seen[0]}


def by_trace(values: dict[str, np.ndarray], traces: Sequence[Trace], name: str) -> np.ndarray:
    """The one value that all targets of each trace have."""
    found = []
    for number, trace in enumerate(traces):
        own_N = values["trace"] == number
        (value,) = set(values[name][own_N].tolist())
        assert own_N.sum() == trace.sampled_count
        found.append(value)
    return np.array(found)


def test_each_trace_has_its_group_advantage_and_equal_weight(trainer_of, traces) -> None:
    values = values_of(learner(trainer_of(), Objective(advantage="dr_grpo")), traces, REWARDS)
    # The groups' means are -0.5 and 0.
    expected = np.array(REWARDS) - np.repeat([-0.5, 0.0], SAMPLES)
    assert by_trace(values, traces, "advantage") == pytest.approx(expected)
    assert (values["weight"] == 1).all() and len(values["weight"]) == sum(t.sampled_count for t in traces)


def test_the_mean_over_traces_weighs_each_trace_alike(trainer_of, traces) -> None:
    values = values_of(learner(trainer_of(), Objective(aggregation="sequence")), traces, REWARDS)
    targets = sum(trace.sampled_count for trace in traces)
    expected = [targets / (8 * t.sampled_count) for t in traces]
    assert by_trace(values, traces, "weight") == pytest.approx(expected, rel=1e-6)  # float32


def test_truncated_traces_carry_no_loss_but_count_in_their_group(trainer_of, traces) -> None:
    cut = [replace(t, finish="length" if i % 2 else "eos") for i, t in enumerate(traces)]
    objective = Objective(advantage="dr_grpo", mask_truncated=True)
    single = learner(trainer_of(), objective)
    values = values_of(single, cut, REWARDS)
    assert (by_trace(values, cut, "weight") == 0).tolist() == [t.finish == "length" for t in cut]
    expected = np.array(REWARDS) - np.repeat([-0.5, 0.0], SAMPLES)
    assert by_trace(values, cut, "advantage") == pytest.approx(expected)


def test_a_trace_without_a_reward_is_left_out_of_loss_and_group(trainer_of, traces) -> None:
    rewards = [None, 1.0, -1.0, -1.0, None, None, None, 1.0]
    objective = Objective(advantage="dr_grpo", aggregation="sequence")
    values = values_of(learner(trainer_of(), objective), traces, rewards)
    third = 1 / 3
    expected = [0, 4 * third, -2 * third, -2 * third, 0, 0, 0, 0]
    assert by_trace(values, traces, "advantage") == pytest.approx(expected)
    counts = np.array([trace.sampled_count for trace in traces])
    scored = np.array([reward is not None for reward in rewards])
    weights = np.where(scored, counts.sum() / (scored.sum() * counts), 0)
    assert by_trace(values, traces, "weight") == pytest.approx(weights, rel=1e-6)  # float32
    metrics = learn(learner(trainer_of(), objective), traces, rewards, lr=1e-3)
    assert metrics["masked"] == pytest.approx(1 - counts[scored].sum() / counts.sum())


def test_an_advantage_and_a_surrogate_of_the_user(trainer_of, traces) -> None:
    own = Objective(
        advantage="tests.unit.rl.own_objective:dr_grpo", surrogate="tests.unit.rl.own_objective:clipped"
    )
    same = Objective(advantage="dr_grpo")
    rewards = [None, *REWARDS[1:]]
    metrics = [learn(learner(trainer_of(), one, updates=2), traces, rewards, 1e-2) for one in (own, same)]
    for name in ("loss", "grad_norm", "entropy", "kl_old"):
        assert metrics[0][name] == metrics[1][name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage": "scalar"}, "objective.advantage tests.unit.rl.own_objective:scalar: it returned arr"),
        ({"advantage": "infinite"}, "for rewards of shape (2, 4); return a finite number for each"),
        ({"advantage": "raises"}, "raises: RuntimeError: not today, own_objective.py line"),
        ({"surrogate": "detached"}, "detached: it returned tensor("),
        ({"surrogate": "total"}, "targets; return a tensor with the gain of each"),
        ({"advantage": "wordless"}, "wordless: a Wordless, own_objective.py line"),
        ({"surrogate": "in_numpy"}, "in_numpy: it returned array(["),
        ({"surrogate": "exits"}, "objective.surrogate tests.unit.rl.own_objective:exits: SystemExit: 1"),
    ],
)
def test_a_fault_in_a_formula_of_the_user_is_one_line(trainer_of, traces, settings, message: str) -> None:
    objective = Objective(
        **{name: f"tests.unit.rl.own_objective:{function}" for name, function in settings.items()}
    )
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        learn(learner(trainer_of(), objective), traces, REWARDS, 1e-3)
    assert "\n" not in str(caught.value)


def test_a_long_trace_loses_reward(trainer_of, traces) -> None:
    objective = Objective(advantage="dr_grpo", overlong_cache=60, overlong_penalty=3.0)
    values = values_of(learner(trainer_of(), objective), traces, [0.0] * 8)
    lengths = np.array([len(t.tokens) for t in traces], float)
    penalties = -3.0 * lengths / 60
    expected = penalties - np.repeat(penalties.reshape(2, 4).mean(1), 4)
    assert by_trace(values, traces, "advantage") == pytest.approx(expected, abs=1e-6)  # float32
    metrics = learn(learner(trainer_of(), objective), traces, [0.0] * 8, lr=1e-3)
    assert metrics["penalty_overlong"] == pytest.approx(penalties.mean())


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_to_itself_is_nothing_and_grows_with_updates(trainer_of, traces, kind) -> None:
    trainer = trainer_of()
    penalized = learner(trainer, Objective(kl=kind, kl_coefficient=0.1), reference=reference_of(trainer))
    kls = [learn(penalized, traces, REWARDS, lr=3e-3)["kl"] for _ in range(3)]
    assert abs(kls[0]) <= 1e-6 < abs(kls[2])


def test_kl_in_the_reward_is_the_sum_over_a_trace(trainer_of, traces) -> None:
    trainer = trainer_of()
    reference = reference_of(trainer)
    learn(learner(trainer, Objective()), traces, REWARDS, lr=1e-2)
    objective = Objective(advantage="dr_grpo", kl="k1", kl_in="reward", kl_coefficient=0.5)
    values = values_of(learner(trainer, objective, reference=reference), traces, [0.0] * 8)
    apart = values["old"].astype(np.float64) - values["reference"]
    advantages = by_trace(values, traces, "advantage")
    penalties = np.array([-0.5 * apart[values["trace"] == number].sum() for number in range(8)])
    expected = penalties - np.repeat(penalties.reshape(2, 4).mean(1), 4)
    assert advantages == pytest.approx(expected, abs=1e-5)  # float32, of penalties of some units
    metrics = learn(learner(trainer, objective, reference=reference), traces, [0.0] * 8, lr=0.0)
    again = values_of(learner(trainer, objective, reference=reference), traces, [0.0] * 8)
    moved = -0.5 * (again["old"].astype(np.float64) - again["reference"]).sum() / 8
    assert metrics["penalty_kl"] == pytest.approx(moved, rel=1e-5) and moved != 0


def test_the_reference_is_renewed_when_it_should(trainer_of, traces) -> None:
    trainer = trainer_of()
    reference = reference_of(trainer, every=2)
    first = [p.clone() for p in reference.model.parameters()]
    learn(learner(trainer, Objective()), traces, REWARDS, lr=1e-2)
    assert [reference.version(step) for step in range(5)] == [0, 0, 2, 2, 4]
    assert all(torch.equal(a, b) for a, b in zip(first, reference.model.parameters(), strict=True))
    reference.copy_from(trainer.model)
    pairs = zip(trainer.model.parameters(), reference.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_paths_answer_for_themselves(trainer_of, traces) -> None:
    verdicts = [[[True, False, None] for _ in t.tree.all_blocks()] for t in traces]
    assert any(verdicts)
    trainer = trainer_of()
    objective = Objective(advantage="dr_grpo", path_credit=True)
    seen: set[float] = set()
    update = trainer.update

    def spy(batches, loss, lr):
        for batch in batches:
            seen.update(batch.values["advantage"].tolist())
        return update(batches, loss, lr)

    trainer.update = spy  # type: ignore[method-assign]
    learn(learner(trainer, objective), traces, [0.25] * 8, lr=1e-3, path_verdicts=verdicts)
    assert seen == {0.0, 1.0, -1.0}  # equal rewards: only the paths are apart


def test_correction_and_mismatch_are_reported(trainer_of, traces) -> None:
    distorted = [replace(t, logprobs=tuple(p - 0.5 for p in t.logprobs)) for t in traces]
    objective = Objective(correction="truncate", correction_cap=1.2)
    metrics = learn(learner(trainer_of(), objective), distorted, REWARDS, lr=1e-3)
    # Forced tokens have log-prob 0 and carry no loss; sampled ones are e^0.5 = 1.65 times likelier here.
    assert metrics["mismatch_mean"] == pytest.approx(0.5, abs=1e-5)
    assert metrics["correction"] == pytest.approx(1.2) and metrics["corrected"] == 1
    assert metrics["correction_effective"] == pytest.approx(1.0)


def test_what_the_updates_of_a_step_did_is_reported(trainer_of, traces) -> None:
    cut = [replace(t, finish="length" if i == 0 else "eos") for i, t in enumerate(traces)]
    objective = Objective(dual_clip=1.0001, mask_truncated=True)
    metrics = learn(learner(trainer_of(), objective, updates=2), cut, REWARDS, lr=3e-3)
    assert metrics["tokens_trained"] == sum(t.sampled_count for t in traces[1:])
    # The second update is of other groups, whose log-probs the first has moved.
    assert 0 < metrics["clip_dual"] < 1 and metrics["kl_old"] > 1e-6
    once = learn(learner(trainer_of(), Objective()), cut, REWARDS, lr=3e-3)
    assert once["kl_old"] == 0 and "clip_dual" not in once
    assert once["tokens_trained"] == sum(t.sampled_count for t in traces)


def test_what_only_some_objectives_report(trainer_of, traces) -> None:
    def names(**settings: object) -> set[str]:
        trainer = trainer_of()
        by_learner = learner(trainer, Objective(**settings), reference=reference_of(trainer))
        return set(learn(by_learner, traces, REWARDS, lr=1e-3))

    plain = names()
    assert names(correction="mask") - plain == {"correction", "corrected", "correction_effective"}
    assert names(dual_clip=3.0, overlong_cache=9) - plain == {"clip_dual", "penalty_overlong"}
    assert names(kl="k3") - plain == {"kl"} and names(kl="k1", kl_in="reward") - plain == {"penalty_kl"}


def test_more_updates_than_groups_are_as_many_as_groups(trainer_of, traces) -> None:
    trainer = trainer_of()
    updates_done = 0
    update: Callable = trainer.update

    def count(batches, loss, lr):
        nonlocal updates_done
        updates_done += 1
        return update(batches, loss, lr)

    trainer.update = count  # type: ignore[method-assign]
    metrics = learn(learner(trainer, Objective(), updates=5), traces, REWARDS, lr=1e-3)
    assert updates_done == 2 and metrics["mismatch_max"] <= metrics["mismatch_rounding"] == 2e-5


def test_training_in_fp8_may_be_as_far_from_rollouts_as_fp8_rounds(trainer_of) -> None:
    trainer = trainer_of()
    shape, trainer.model.config.fp8 = trainer.model.architecture, "hybrid"
    # 8 u sqrt(2 L + 2) s, with the roundoff 2^-4 of e4m3.
    unit, uniform = 2**-4 * math.sqrt(2 * shape.layers + 2), math.log(shape.vocab) / trainer.temperature
    rounding = learner(trainer, Objective())._rounding
    assert rounding(0.0).largest == pytest.approx(8 * unit * uniform)
    assert rounding(2 * uniform).largest == pytest.approx(8 * unit * 2 * uniform)
