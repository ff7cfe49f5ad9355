"""What cannot be split is refused before any process group starts, with a setting that works."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_parallel_r1.architecture.model_config import ExpertsConfig, ModelConfig
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig, check_parallel
from megatron_parallel_r1.errors import UserError

SHAPE = ModelConfig(hidden=48, layers=6, heads=6, kv_heads=3, head_dim=8, ffn=96, vocab=101)

EXPERTS = replace(SHAPE, family="qwen3_moe", experts=ExpertsConfig(count=6, per_token=2, ffn=40))


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        (ParallelConfig(tensor=4), 4, "tensor 4 does not divide the model's heads 6; set tensor to 3"),
        (ParallelConfig(tensor=2), 2, "tensor 2 does not divide the model's kv_heads 3; set tensor to 1"),
        (ParallelConfig(pipeline=4), 4, "6 layers cannot be cut into pipeline 4 .* set pipeline to 3"),
        (ParallelConfig(pipeline=2, virtual=2), 2, "= 4 equal stages; set pipeline to 3 and virtual to 1"),
        (ParallelConfig(pipeline=3, first_stage_layers=1), 3, "6 layers leave 5 layers for 2 ranks of pipel"),
        (
            ParallelConfig(pipeline=2, first_stage_layers=1, last_stage_layers=4),
            2,
            "leave 1 layers for 0 ranks",
        ),
        (
            ParallelConfig(tensor=3, pipeline=2),
            8,
            "= 6 does not divide the 8 processes; start a multiple of 6",
        ),
        (
            ParallelConfig(context=2),
            2,
            "max_tokens_per_micro_batch: 1001 is no multiple of 4, .* set it to 1004",
        ),
        (
            ParallelConfig(tensor=3, sequence=True),
            3,
            "max_tokens_per_micro_batch: 1001 is no multiple of 3, .* set it to 1002",
        ),
    ],
)
def test_what_does_not_divide_is_refused(parallel: ParallelConfig, world: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_parallel(SHAPE, parallel, world, max_tokens_per_micro_batch=1001)


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        (ParallelConfig(expert=4), 4, "expert 4 does not divide the model's 6 experts; set expert to 3"),
        (ParallelConfig(expert=3), 4, "expert 3 x pipeline 1 does not divide the 4 processes; start a multi"),
        (
            ParallelConfig(context=3, expert=2, pipeline=2),
            6,
            "pipeline 2 .* start a multiple of 12",
        ),
        (ParallelConfig(tensor=3), 3, "tensor 3 does not divide the model's ffn 40; set tensor to 1"),
        (ParallelConfig(tensor=3, expert=3), 3, "Megatron trains experts only with sequence"),
    ],
)
def test_experts_that_cannot_be_distributed_are_refused(
    parallel: ParallelConfig, world: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_parallel(EXPERTS, parallel, world)


def test_a_dense_model_has_no_experts_to_distribute() -> None:
    with pytest.raises(UserError, match="expert 2 distributes experts, and the model has none"):
        check_parallel(SHAPE, ParallelConfig(expert=2), 2)


def test_the_group_of_experts_spans_the_others() -> None:
    check_parallel(EXPERTS, ParallelConfig(tensor=3, sequence=True, expert=6), 6)
    check_parallel(EXPERTS, ParallelConfig(context=2, pipeline=2, expert=2), 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor": 0}, r"tensor\n.*greater than or equal to 1"),
        ({"sequence": True}, "sequence needs a tensor size of 2 or more"),
        ({"first_stage_layers": 2}, "they need a pipeline of 2 or more, and virtual 1"),
        ({"virtual": 2}, "virtual 2 interleaves the stages of a pipeline, and pipeline is 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings)


def test_what_divides_passes() -> None:
    check_parallel(SHAPE, ParallelConfig(tensor=3, pipeline=2, virtual=3, context=2, sequence=True), 24, 1200)
    check_parallel(SHAPE, ParallelConfig(), 5)
    uneven = ParallelConfig(pipeline=3, first_stage_layers=1, last_stage_layers=3)
    check_parallel(SHAPE, uneven, 3)
    assert uneven.stage_layers(6) == [1, 2, 3] and ParallelConfig(pipeline=3).stage_layers(6) == [2, 2, 2]
