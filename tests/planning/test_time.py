"""The model of time by hand-computed cases, and by what it must not depend on."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from benchmarks.published_runs import CALIBRATED_ON, HELD_OUT, calibrated, overlapping
from megatron_parallel_r1.architecture.model_config import ExpertsConfig, ModelConfig
from megatron_parallel_r1.architecture.weight_table import weight_table
from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.planning.machine import H100, Cost, Machine, read_machine
from megatron_parallel_r1.planning.plan import plan
from megatron_parallel_r1.planning.rollouts import RolloutLoad, pass_cost, rollout_cost, width
from megatron_parallel_r1.planning.step_time import StepTime
from megatron_parallel_r1.planning.training import (
    MicroBatches,
    Split,
    forward_cost,
    scoring_cost,
    update_cost,
)
from megatron_parallel_r1.rollout.settings import Thinking

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SHAPE = ModelConfig(hidden=64, layers=6, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=1000, tied=False)
MATRICES = sum(prod(w.shape) for w in weight_table(SHAPE) if len(w.shape) == 2 and w.layer is not None)
ROWS = MicroBatches(micro_batches=4, tokens=512, visible=256, targets=500)


def split(parallel: ParallelConfig | None = None, data: int = 1, per_node: int = 8) -> Split:
    return Split(SHAPE, parallel or ParallelConfig(), data, number=2, per_node=per_node)


def test_an_update_has_six_operations_a_weight_and_token() -> None:
    cost = update_cost(split(), ROWS, elements=MATRICES)
    # Logits of the targets alone: made, made again, and two products backward.
    head = 4 * 4 * 2 * 500 * 64 * 1000
    assert cost.products == 4 * 6 * 512 * MATRICES + head
    # Two products over the keys that a query sees forward, five backward.
    assert cost.attention == 4 * 6 * 512 * 256 * (2 + 5) * 2 * 64
    assert cost.layers == 4 * 6 * 3 and cost.updates == 1
    assert cost.node == cost.net == cost.passes == 0


def test_recomputing_costs_what_is_computed_again() -> None:
    none, selective, full = (
        update_cost(split(ParallelConfig(recompute=how)), ROWS, MATRICES)
        for how in ("none", "selective", "full")
    )
    forward = 4 * forward_cost(split(), 512, 256)
    mlp = 4 * 6 * 2 * 512 * 3 * 64 * 96
    assert full.products - none.products == pytest.approx(forward.products)
    assert full.attention - none.attention == pytest.approx(forward.attention)
    assert selective.products - none.products == pytest.approx(mlp)
    assert selective.attention == none.attention


def test_a_tensor_group_shares_products_and_sends_sums() -> None:
    whole, half = (update_cost(split(ParallelConfig(tensor=size)), ROWS, MATRICES // size) for size in (1, 2))
    assert half.products == whole.products / 2 and half.attention == whole.attention / 2
    # Two sums of 512 x 64 numbers of 2 bytes a layer, forward and twice that backward, by a ring of two.
    assert half.node == 4 * 6 * 3 * 2 * (512 * 64 * 2) * (2 * 1 / 2)
    crowded = update_cost(split(ParallelConfig(tensor=2), per_node=1), ROWS, MATRICES // 2)
    assert (crowded.node, crowded.net) == (0, half.node)


def test_a_pipeline_waits_at_both_ends() -> None:
    one, three, interleaved = (
        update_cost(split(parallel), ROWS, 0)
        for parallel in (ParallelConfig(), ParallelConfig(pipeline=3), ParallelConfig(pipeline=3, virtual=2))
    )
    head = 4 * 2 * 500 * 64 * 1000
    body = 6 * 512 * MATRICES
    assert one.products == 4 * (body + head)
    assert three.products == pytest.approx((4 + 2) * (body / 3 + head))
    assert interleaved.products == pytest.approx((4 + 1) * (body / 3 + head))


def test_gradients_are_summed_over_the_copies() -> None:
    elements = 10_000
    whole, sharded = (
        update_cost(split(ParallelConfig(sharded_optimizer=shard), data=4), ROWS, elements)
        for shard in (False, True)
    )
    assert whole.node == 2 * 4 * elements * 3 / 4  # float32, there and back, by a ring of four
    assert sharded.node == (4 + 2) * elements * 3 / 4  # gradients there, bfloat16 weights back
    assert whole.stream - sharded.stream == (28 + 2) * elements * 3 / 4  # Adam on a quarter of them


def test_experts_are_counted_by_those_a_token_goes_through() -> None:
    shape = replace(SHAPE, family="qwen3_moe", experts=ExpertsConfig(count=8, per_token=2, ffn=32))
    cost = forward_cost(replace(split(), shape=shape), 512, 256)
    assert cost.experts == 6 * 512 * 2 * 2 * 3 * 64 * 32
    dense = forward_cost(split(), 512, 256)
    assert dense.products - cost.products == 6 * 512 * 2 * (3 * 64 * 96 - 64 * 8)  # a router instead


def test_scoring_is_a_forward() -> None:
    cost = scoring_cost(split(), ROWS)
    assert cost.products == 4 * 512 * 2 * MATRICES + 4 * 2 * 500 * 64 * 1000


def test_a_pass_reads_the_weights_once_and_each_rows_cache() -> None:
    few, many = (pass_cost(split(), rows, context=100) for rows in (1, 10))
    assert many.products == 10 * few.products == 10 * 2 * (MATRICES + 64 * 1000)
    assert few.passes == many.passes == 6
    cache, logits = 6 * 2 * 100 * 2 * 32, 3 * 4 * 1000
    assert few.stream == 2 * (MATRICES + 64 * 1000) + cache + logits
    assert many.stream == 2 * (MATRICES + 64 * 1000) + 10 * (cache + logits)


def test_paths_decode_at_once() -> None:
    sequential = Thinking(mode="sequential", max_response_tokens=1000)
    # Two blocks of four paths of 98 tokens and two tags: 800 of 1,000 tokens, four at a time.
    parallel = Thinking(paths=4, max_blocks=2, max_path_tokens=98, max_response_tokens=1000)
    assert width(sequential) == 1 and width(parallel) == 1000 / (200 + 800 / 4)
    draws = RolloutLoad(prompts=2, prompt=10, traces=8, concurrent=4)
    one, four = (rollout_cost(split(), thinking, draws) for thinking in (sequential, parallel))
    assert one.passes == 8 * 1000 / 4 * 6 and four.passes == one.passes / 2.5


def test_rollouts_ahead_hide_behind_training() -> None:
    time = StepTime(sync=1.0, rollout=5.0, logprobs=2.0, update=4.0, overlaps=False)
    assert time.total == 12 and replace(time, overlaps=True).total == 7


def test_the_curriculum_scales_with_its_processes() -> None:
    recipe = read_recipe(RECIPES / "qwen3_4b/curriculum.yaml")
    few, many = (plan(recipe, world).stages[-1].time for world in (16, 128))
    assert few.rollout / 8 < many.rollout < few.rollout / 7  # fewer rows share the reading of weights
    assert few.update / 8 < many.update < few.update / 7  # the optimizer and its links do not shrink so
    slower = plan(recipe, 16, machine=H100.replace(products=H100.products / 2)).stages[-1].time
    assert few.update < slower.update < 2 * few.update


def test_the_published_rates_are_those_that_the_published_runs_give() -> None:
    machine = overlapping(H100)
    for kind, run in CALIBRATED_ON.items():
        assert calibrated(kind, machine) == pytest.approx(getattr(H100, kind), rel=0.01)
        assert machine.seconds(run.cost(machine), fp8=True) == pytest.approx(run.seconds, rel=0.01)
    dense = [run for run in HELD_OUT if run.shape.experts is None]
    errors = [machine.seconds(run.cost(machine), fp8=True) / run.seconds - 1 for run in dense]
    assert max(map(abs, errors)) < 0.2  # what docs/performance.md says of them


def test_a_machine_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    kinds = {"products": 2e12, "experts": 1e12, "attention": 1e12, "stream": 1e11, "node": 1e10, "net": 1e9}
    rates = "".join(f"{kind}: {rate:.1e}\n" for kind, rate in kinds.items())
    file.write_text(f"name: own\nper_node: 4\n{rates}")
    machine = read_machine(str(file))
    assert isinstance(machine, Machine) and machine.seconds(Cost(products=4e12, net=1e9)) == 3.0
    assert read_machine("H100") is H100
    for text, message in (
        (f"name: own\nper_node: 4\nspeed: 3\n{rates}", "speed: unknown key"),
        (f"name: own\nper_node: 0\n{rates}", "per_node: Input should be greater than or equal to 1"),
        (f"name: own\nper_node: 4\nhidden: 1.5\n{rates}", "hidden: Input should be less than or equal to 1"),
        ("name: [", "is not valid YAML"),
        ("name: own\n", "per_node: missing key"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message) as refused:
            read_machine(str(file))
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="not built in"):
        read_machine("h9000")
