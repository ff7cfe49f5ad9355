"""The pipeline's order, its end and its resumption with a fake engine; then with a real engine and trainer.

Several processes: tests/parallel/test_ahead.py. A whole run: tests/curriculum.
"""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_parallel_r1.config.objective import Objective
from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.rewards.base import Score
from megatron_parallel_r1.rl.learner import BatchConfig, Learner
from megatron_parallel_r1.rl.metrics import staleness_metrics
from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.rl.pending import from_json, to_json
from megatron_parallel_r1.rl.rollout_batch import RolloutBatch, Rollouts, drop_stale, stale_groups, staleness
from megatron_parallel_r1.rl.rollout_queue import SyncRollouts
from megatron_parallel_r1.rollout.engine import Completion, Sampling
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.thought.tree import Tree
from megatron_parallel_r1.train.trainer import Trainer
from tests.reference.traces import TAGS
from tests.unit.rl.flights import Flight, open_queue
from tests.unit.rl.steps import learn
from tests.unit.rollout.test_exactness import largest_difference
from tests.unit.rollout.tiny import native_engine, random_prompts, tiny_qwen3, traces_of

PATIENCE_S = 60.0


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "rollout"]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 9])
def test_each_batch_is_rolled_out_by_the_weights_that_k_says(k: int, together: bool) -> None:
    flight = Flight(k, jitter=k, runs_on_all_ranks=together)
    flight.run()
    assert list(flight.taken) == [1, 2, 3, 4, 5, 6]
    for step, batch in flight.taken.items():
        assert {outline.version for outline in batch.all.outlines} == {max(0, step - 1 - k)}
        assert max(staleness(outline, step) for outline in batch.all.outlines) == min(k, step - 1)
    assert set(flight.threads.values()) == ({"rollout"} if k else {"MainThread"})
    assert not alive()


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_an_evaluation_borrows_the_engine_and_changes_no_batch(k: int, together: bool) -> None:
    plain = Flight(k, jitter=k, runs_on_all_ranks=together)
    evaluated = Flight(k, jitter=k, runs_on_all_ranks=together, evaluates=True)
    plain.run()
    evaluated.run()
    assert evaluated.weight == plain.weight
    for step, batch in evaluated.taken.items():
        assert {outline.version for outline in batch.all.outlines} == {max(0, step - 1 - k)}


def test_no_staleness_is_the_plain_loop() -> None:
    flight = Flight(0, steps=2)
    assert isinstance(flight.open(), SyncRollouts)
    flight.run()
    turn = ["published", "rolls out", "trains"]
    assert flight.events == [(what, step - (what == "published")) for step in (1, 2) for what in turn]


@pytest.mark.parametrize("k", [1, 3])
def test_what_is_rolled_out_does_not_depend_on_time(k: int) -> None:
    flights = [Flight(k, jitter=jitter) for jitter in (None, 1, 2, 3)]
    for flight in flights:
        flight.run()
    first = flights[0]
    assert all(flight.taken == first.taken for flight in flights)
    assert all(torch.equal(flight.weight, first.weight) for flight in flights)
    other = Flight(k + 1)
    other.run()
    assert not torch.equal(first.weight, other.weight)


def test_a_batch_is_rolled_out_while_another_trains() -> None:
    began, trained = threading.Event(), threading.Event()
    overlapped = []

    class Watched(Flight):
        def roll_out(self, step: int) -> RolloutBatch:
            if step == 2:
                began.set()
                overlapped.append(trained.wait(PATIENCE_S))
            return super().roll_out(step)

        def train(self, step: int, batch: RolloutBatch) -> None:
            if step == 1:
                # Returns only because batch 2 has begun; and that ends only because this has returned.
                overlapped.append(began.wait(PATIENCE_S))
            super().train(step, batch)
            trained.set()

    Watched(1).run()
    assert overlapped == [True, True]


@pytest.mark.parametrize(
    ("k", "save_after"), [(0, 3), (1, 1), (1, 3), (2, 3), (3, 3), (2, 5), (9, 2), (1, 6)]
)
@pytest.mark.parametrize("together", [True, False])
def test_a_run_goes_on_bit_for_bit(k: int, save_after: int, together: bool) -> None:
    whole, first = Flight(k), Flight(k, jitter=4, runs_on_all_ranks=together)
    whole.run()
    state = json.loads(json.dumps(first.run(save_after)))
    assert len(state["in_flight"]) == min(k, 6 - save_after)
    second = Flight(
        k, jitter=5, done=save_after, runs_on_all_ranks=together, saved=state, weight=first.weight.clone()
    )
    second.run()
    assert first.taken | second.taken == whole.taken
    assert torch.equal(second.weight, whole.weight)
    assert second.stream.state() == whole.stream.state()
    # What was in flight is not rolled out again.
    assert min(second.threads, default=7) == min(save_after + k, 6) + 1


def test_saving_changes_nothing_and_can_be_done_at_each_step() -> None:
    whole, saving = Flight(2), Flight(2)
    whole.run()
    with saving.open() as ahead:
        for step in range(1, 7):
            ahead.update_weights([("weight", saving.weight)], version=step - 1)
            saving.train(step, ahead.next_batch(step))
            state = saving.state(ahead)
            resumed = Flight(2, done=step, saved=state, weight=saving.weight.clone())
            resumed.run()
            assert torch.equal(resumed.weight, whole.weight)
    assert saving.taken == whole.taken


def test_an_error_of_the_second_thread_comes_out_at_take() -> None:
    class Failing(Flight):
        def roll_out(self, step: int) -> RolloutBatch:
            if step == 3:
                raise ValueError("batch 3 cannot be made")
            return super().roll_out(step)

    flight = Failing(1)
    with pytest.raises(ValueError, match="batch 3 cannot be made"):
        flight.run()
    assert set(flight.taken) <= {1, 2} and not alive()
    with pytest.raises(ValueError, match="batch 3"):
        Failing(2).run(save_after=2)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError])
def test_leaving_the_block_ends_a_batch_under_way(raised: type[BaseException]) -> None:
    engine = native_engine(tiny_qwen3())
    began = threading.Event()

    def for_ever(step: int) -> RolloutBatch:
        async def write() -> None:
            context = engine.open()
            await engine.write(context, [9, 10])
            began.set()
            await engine.sample(context, Sampling(), 10**9, frozenset(), frozenset())

        asyncio.run(write())
        raise AssertionError("a billion tokens were drawn")

    with (
        pytest.raises(raised),
        open_queue(for_ever, engine, max_off_policy_steps=1, steps=3) as ahead,
    ):
        ahead.update_weights(tiny_qwen3().state_dict().items(), version=0)
        assert began.wait(PATIENCE_S)
        raise raised
    assert not alive()


def test_a_thread_that_waits_for_weights_ends_too() -> None:
    with Flight(1).open():
        assert alive()
    assert not alive()


def test_a_stage_that_ends_early_makes_what_all_processes_have_begun() -> None:
    flight = Flight(2, jitter=1)
    with flight.open() as ahead:
        for step in (1, 2):
            ahead.update_weights([("weight", flight.weight)], version=step - 1)
            flight.train(step, ahead.next_batch(step))
    assert sorted(flight.threads) == [1, 2, 3, 4] and not alive()


def test_copies_of_weights_do_not_pile_up() -> None:
    copies: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = []

    class Counted:
        """Remembers its copies."""

        def __init__(self, weight: torch.Tensor) -> None:
            self.weight = weight

        def detach(self) -> Counted:
            return self

        def clone(self) -> torch.Tensor:
            copy = self.weight.clone()
            copies.add(copy)
            most.append(len(copies))
            return copy

    for k in (1, 2):
        flight = Flight(k, steps=9)
        with flight.open() as ahead:
            for step in range(1, 10):
                ahead.update_weights([("weight", Counted(flight.weight))], version=step - 1)
                flight.train(step, ahead.next_batch(step))
        assert max(most) <= k + 1
        most.clear()
        gc.collect()
        assert not copies


def unpacked(rollouts: Rollouts) -> list[Trace]:
    return [trace.unpack() for trace in rollouts.traces]


def tiny_batch(mode: str = "isolated", experts: bytes = b"") -> RolloutBatch:
    """Real traces with blocks, nested ones too; of three groups two are kept."""
    thinking = Thinking(mode=mode, max_depth=2, max_path_tokens=12, max_response_tokens=70)
    traces = traces_of(native_engine(tiny_qwen3()), thinking, random_prompts(12))
    traces[1] = replace(traces[1], experts=experts)
    flight = Flight(0)
    flight.engine.version = 0
    rollouts = flight.roll_out(5).all
    values = [0.1, 1 / 3, -0.0, 1e-310, 5e300, 2.0**-1074]
    every = Rollouts(
        [rollouts.problems[0]] * 6 + [rollouts.problems[2]] * 6,
        [PackedTrace.of(trace) for trace in traces],
        [rollouts.judged[0]] * 12,
        [Score(value, {"a": value, "b": -value}) for value in values * 2],
    )
    return RolloutBatch(every, every.groups([0, 2], 4), rounds=2, times={"time_draw_s": 1.5})


def test_a_batch_in_flight_comes_back_from_json() -> None:
    batch = tiny_batch(experts=bytes(range(64)))  # of a trace that a mixture of experts wrote
    assert max(outline.tree.depth for outline in batch.all.outlines) == 2
    written = json.dumps(to_json(batch))
    found = from_json(json.loads(written))
    assert found == batch and repr(found) == repr(batch)
    assert found.trained.traces[0] is found.all.traces[0]


def test_a_batch_that_an_earlier_release_wrote_is_read_under_its_old_field_name() -> None:
    batch = tiny_batch()
    assert any(trace.column("suppressed").any() for trace in batch.all.traces)
    written = json.loads(json.dumps(to_json(batch)))
    written["traces"]["barred"] = written["traces"].pop("suppressed")
    del written["times"], written["traces"]["experts"]
    found = from_json(written)
    assert found == batch and found.times == {}


def test_groups_with_one_stale_trace_are_dropped_whole() -> None:
    flight = Flight(0)

    def group(*versions: int) -> Rollouts:
        flight.engine.version = versions[0]
        pair = flight.roll_out(3).all.groups([0], 2)
        flight.engine.version = versions[1]
        pair.traces[1] = flight.roll_out(3).all.traces[1]
        return pair

    fresh, half, old = group(5, 5), group(5, 3), group(2, 4)
    every = fresh + half + old
    assert [staleness(outline, 6) for outline in every.outlines] == [0, 0, 0, 2, 3, 1]
    assert stale_groups(every.outlines, 6, most=2, size=2) == [False, False, True]
    batch = RolloutBatch(every, every, 1)
    assert drop_stale(batch, 6, most=3, size=2) is batch
    assert drop_stale(batch, 6, most=2, size=2) == RolloutBatch(every, fresh + half, 1)
    assert drop_stale(batch, 6, most=1, size=2) == RolloutBatch(every, fresh, 1)
    expected = {"staleness": 1.0, "staleness_max": 3, "groups_stale": 2}
    assert staleness_metrics(every.outlines, 6, most=1, size=2) == expected
    with pytest.raises(RuntimeError, match="step 9: all its 3 groups are more than 1 updates old"):
        drop_stale(batch, 9, most=1, size=2)


def trained(
    trainer: Trainer, k: int, partial_rollout: bool = False
) -> tuple[dict[int, RolloutBatch], list[dict]]:
    """Four steps on traces of a real engine; the batches, and the weights after 0, 1, … of them."""
    thinking = Thinking(max_path_tokens=10, max_response_tokens=50)
    engine = native_engine(tiny_qwen3())
    learner = Learner(
        trainer, Objective(correction="truncate"), BatchConfig(4, 1, 1, 512, 50), "isolated", TAGS
    )

    def make(step: int) -> RolloutBatch:
        prompts = [prompt for prompt in random_prompts(6, seed=step) for _ in range(4)]
        thinker = Thinker(engine, TAGS, thinking)
        traces = asyncio.run(roll_out(thinker, prompts, list(range(100 * step, 100 * step + 24))))
        rollouts = Flight(0).roll_out(1).all
        scores = [Score(value := float(trace.tokens.count(7)), {"sevens": value}) for trace in traces]
        packed = [PackedTrace.of(trace) for trace in traces]
        every = Rollouts(rollouts.problems[:1] * 24, packed, rollouts.judged[:1] * 24, scores)
        return RolloutBatch(every, every, 1)

    found, weights = {}, []
    with open_queue(make, engine, max_off_policy_steps=k, partial_rollout=partial_rollout, steps=4) as ahead:
        for step in range(1, 5):
            weights.append({name: tensor.clone() for name, tensor in hf_tensors(trainer.model)})
            ahead.update_weights(hf_tensors(trainer.model), version=step - 1)
            found[step] = ahead.next_batch(step)
            learn(learner, unpacked(found[step].trained), found[step].trained.rewards, lr=1e-2)
    return found, weights


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_real_engine_is_exact_under_its_version_while_the_trainer_goes_on(
    trainer_of: Callable[..., Trainer], k: int
) -> None:
    found, weights = trained(trainer_of(), k)
    again, _ = trained(trainer_of(), k)
    assert again == found
    model = tiny_qwen3()
    for step, batch in found.items():
        model.load_state_dict(weights[max(0, step - 1 - k)])
        # As in tests/unit/rollout/test_exactness.py: float32 and logits of some units.
        assert largest_difference(model, unpacked(batch.all), "isolated") <= 2e-5
    if k:
        model.load_state_dict(weights[3])
        assert largest_difference(model, unpacked(found[4].all), "isolated") > 1e-3


def test_partial_rollouts_train_and_no_token_is_too_old(trainer_of: Callable[..., Trainer]) -> None:
    found, _ = trained(trainer_of(), k=1, partial_rollout=True)
    for step, batch in found.items():
        versions = [version for trace in unpacked(batch.all) for version in trace.versions]
        assert step - 2 <= min(versions) and max(versions) <= step, step


def test_a_partial_batch_meets_weights_that_are_published_meanwhile() -> None:
    engine = native_engine(tiny_qwen3())
    begun, published = threading.Event(), threading.Event()

    def make(step: int) -> RolloutBatch:
        async def write() -> tuple[Completion, Completion]:
            context = engine.open()
            await engine.write(context, [9, 10])
            before = await engine.sample(context, Sampling(), 3, frozenset(), frozenset())
            if step == 2:
                begun.set()
                assert published.wait(PATIENCE_S)
            after = await engine.sample(context, Sampling(), 3, frozenset(), frozenset())
            engine.close(context)
            return before, after

        before, after = asyncio.run(write())
        versions = (*before.versions, *after.versions)
        nothing = ((False,) * 6, (0.0,) * 6, "length", Tree(6))
        trace = Trace((9, 10), (*before.tokens, *after.tokens), (True,) * 6, *nothing, versions)
        rollouts = Flight(0).roll_out(1).all.groups([0], 1)
        only = replace(rollouts, traces=[PackedTrace.of(trace)])
        return RolloutBatch(only, only, 1)

    weights = tiny_qwen3(seed=1).state_dict()
    with open_queue(make, engine, max_off_policy_steps=1, partial_rollout=True, steps=3) as ahead:
        ahead.update_weights(weights.items(), version=0)
        assert ahead.next_batch(1).all.traces[0].unpack().versions == (0,) * 6
        assert begun.wait(PATIENCE_S)
        ahead.update_weights(weights.items(), version=1)
        published.set()
        (second,) = ahead.next_batch(2).all.traces
        assert second.unpack().versions == (0, 0, 0, 1, 1, 1) and staleness(second.outline, 2) == 1
        ahead.update_weights(weights.items(), version=2)
        assert min(ahead.next_batch(3).all.traces[0].unpack().versions) >= 1
