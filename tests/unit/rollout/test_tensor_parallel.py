"""What one process of a team keeps of a model. That the parts make a whole: tests/parallel/test_engine.py."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.distributed.parallel_config import check_native_heads, check_native_split
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.native.model import DecodeModel
from megatron_parallel_r1.rollout.native.tensor_parallel import SHARD_DIM, TensorParallelGroup, local_shard
from tests.unit.rollout.tiny import tiny_qwen3

CONFIG = ModelConfig(
    hidden=32, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=48, vocab=40, rope_theta=1e3, tied=False
)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.o_proj.weight"])
def test_parts_make_the_whole_and_zeros_fill_them(name: str, size: int) -> None:
    whole = torch.randn(5, 5)
    parts = [local_shard(name, whole, TensorParallelGroup(rank, size, None)) for rank in range(size)]
    assert len({part.shape for part in parts}) == 1
    dim = SHARD_DIM[name.split(".")[-2]]
    joined, rest = torch.cat(parts, dim).tensor_split([5], dim)
    assert torch.equal(joined, whole) and not rest.any()


def test_a_part_is_a_copy() -> None:
    for name in ("lm_head.weight", "model.norm.weight"):
        whole = torch.ones(4, 4)
        part = local_shard(name, whole, TensorParallelGroup(1, 2, None))
        whole.zero_()
        assert part.eq(1).all()


def test_a_rank_never_holds_the_whole_model() -> None:
    model = tiny_qwen3()
    arrived: list[weakref.ref[torch.Tensor]] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in model.state_dict().items():
            # The loop that takes them still has its hand on the last.
            assert all(whole() is None for whole in arrived[:-1]), name
            fresh = tensor.clone()
            arrived.append(weakref.ref(fresh))
            yield name, fresh
            del fresh

    part = DecodeModel(CONFIG, tensors(), slots=8, group=TensorParallelGroup(1, 2, None))
    kept = [part.embedding_VE, part.head_VE, *(layer.qkv_AE for layer in part.layers)]
    kept += [
        matrix
        for layer in part.layers
        for matrix in (layer.output_EA, layer.mlp.gate_up_FE, layer.mlp.down_EF)
    ]
    matrices = [tensor for tensor in model.state_dict().values() if tensor.dim() == 2]
    assert 2 * sum(map(torch.numel, kept)) == sum(map(torch.numel, matrices))
    assert [cache_SX.shape for cache_SX in part.cache_LSX] == [(8, 2 * 1 * 16)] * 2


@pytest.mark.parametrize(
    ("size", "name", "fits"), [(4, "kv_heads 2", 2), (3, "heads 4", 2), (8, "heads 4", 2)]
)
def test_a_team_that_would_cut_a_head_is_refused(size: int, name: str, fits: int) -> None:
    with pytest.raises(
        UserError, match=f"tensor {size} does not divide .* {name}; set parallel.tensor to {fits}$"
    ):
        NativeEngine(CONFIG, TensorParallelGroup(0, size, None))


def test_split_layers_and_rows_are_refused_in_one_line() -> None:
    check_native_split(pipeline=1, context=1)
    check_native_heads(heads=4, kv_heads=2, tensor=2)
    for pipeline, context, phrase in (
        (2, 1, "pipeline 2"),
        (1, 4, "context 4"),
        (2, 4, "pipeline 2 and context 4"),
    ):
        with pytest.raises(UserError) as caught:
            check_native_split(pipeline, context)
        message = str(caught.value)
        assert message.startswith(f"native engine: {phrase} ") and "\n" not in message
        assert "SGLang" in message and "mode replay" in message and "parallel.pipeline" in message


def test_a_recipe_is_checked_without_torch() -> None:
    code = "import sys, megatron_parallel_r1.distributed.parallel_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
