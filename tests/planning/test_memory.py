"""What a plan says of memory is what the parts of a real run hold, byte for byte where nothing is rounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.planning.memory import (
    Workload,
    cache_bytes,
    chunks_in_flight,
    logit_bytes,
    memory_use,
    pipeline_parts,
)
from megatron_parallel_r1.planning.published import PUBLISHED
from megatron_parallel_r1.planning.rollouts import longest_row
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.train import target_logprobs as target_logprobs_module
from megatron_parallel_r1.train.target_logprobs import LogprobQuery, target_logprobs
from megatron_parallel_r1.train.trainer import Adam, wrap_for_training
from tests.parallel.launch import ENVIRONMENT, settings_of
from tests.planning.kept_by_autograd import (
    DTYPES,
    LENGTH,
    RECOMPUTE,
    SHAPE,
    SHAPES,
    compare,
    compare_all,
    shapes,
)
from tests.unit.rollout.tiny import native_engine, random_prompts, tiny_qwen3, traces_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    with process.running(seed=1):
        yield


def held(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_gradients_and_optimizer_to_the_byte(dtype: torch.dtype, sharded: bool, tied: bool) -> None:
    # Sizes are multiples of 64 and their sum of 128, to which Megatron fills up buffers that it will shard.
    shape = ModelConfig(hidden=128, layers=2, heads=4, kv_heads=2, head_dim=64, ffn=192, vocab=300, tied=tied)
    parallel = ParallelConfig(sharded_optimizer=sharded)
    model = build_model(shape, dtype, parallel)
    load_hf_tensors(model, random_hf_tensors(shape, seed=0))
    (wrapped,), optimizer = wrap_for_training(model, Adam(lr=1e-3, sharded=sharded))
    for parameter in model.parameters():
        parameter.main_grad.fill_(1.0)
    optimizer.step()
    weights = list(model.parameters())
    moments = [
        value
        for state in optimizer.chained_optimizers[0].optimizer.state.values()
        for name, value in state.items()
        if name in ("exp_avg", "exp_avg_sq")
    ]
    masters = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if dtype != torch.float32
    ]
    (part, *_) = pipeline_parts(shape, parallel)
    planned = memory_use(shape, parallel, part, 1, dtype.itemsize, Workload(64, 1))
    assert planned.weights == held(weights)
    assert planned.gradients == held([buffer.grad_data for buffer in wrapped.buffers])
    assert planned.optimizer == held(moments) + held(masters)
    assert all(tensor.dtype == torch.float32 for tensor in moments + masters)


def reported_by_megatron(shape: ModelConfig, parallel: ParallelConfig, data: int) -> float:
    """Bytes of weights, gradients and optimizer of the fullest rank, as Megatron-LM's own report estimates
    them (`theoretical_memory_usage`): 6 a weight, and 12 shared by the data-parallel ranks, of a pipeline
    rank's layers and embeddings, both split over the tensor group. It knows no expert parallelism.
    """
    ratio = shape.heads * shape.head_dim / shape.hidden
    attention = 2 * shape.hidden**2 * (1 + shape.kv_heads / shape.heads) * ratio
    mlp = 3 * shape.hidden * shape.ffn
    if shape.experts:
        mlp = 3 * shape.hidden * shape.experts.ffn * shape.experts.count
    layers = shape.layers * (attention + mlp + 2 * shape.hidden) + shape.hidden
    embeddings = shape.hidden * shape.vocab * (2 if not shape.tied and parallel.pipeline == 1 else 1)
    return (layers / parallel.pipeline + embeddings) / parallel.tensor * (6 + 12 / data)


@pytest.mark.parametrize("name", ["Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-30B-A3B", "Qwen3-235B-A22B"])
@pytest.mark.parametrize("settings", [{}, {"tensor": 4, "sequence": True}, {"tensor": 2, "pipeline": 2}])
def test_weights_and_optimizer_are_what_megatron_reports(name: str, settings: dict[str, int]) -> None:
    shape, parallel = PUBLISHED[name], ParallelConfig(**settings, sharded_optimizer=True)
    uses = [
        memory_use(shape, parallel, part, 8, 2, Workload(64, 1)) for part in pipeline_parts(shape, parallel)
    ]
    planned = max(use.weights + use.gradients + use.optimizer for use in uses)
    assert abs(planned / reported_by_megatron(shape, parallel, 8) - 1) < 0.005


# What a plan leaves out of a token: its id, two rows of the layout, the index of its target, and two sums of
# the loss, 32 bytes; and one that says whether its id is of this rank's vocabulary.
INDEX_BYTES = 33


@pytest.mark.usefixtures("world")
def test_activations_are_what_autograd_keeps() -> None:
    for kept, planned in compare_all(ParallelConfig()):
        assert 0 <= kept - planned <= INDEX_BYTES * LENGTH


@pytest.mark.usefixtures("world")
def test_activations_of_a_fused_swiglu_are_what_autograd_keeps() -> None:
    with torch.compiler.set_stance("force_eager"):
        for shape, dtype in product(SHAPES, DTYPES):
            kept, planned = compare(shape, dtype, ParallelConfig(), fused=True)
            assert 0 <= kept - planned <= INDEX_BYTES * LENGTH
            assert planned < compare(shape, dtype, ParallelConfig())[1]


@pytest.mark.slow
def test_activations_of_split_models(tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out = tmp_path / "found.json"
    layouts = ("tensor=2 sequence", "context=2", "tensor=2", "expert=2", "expert=2 tensor=2 sequence")
    done = subprocess.run(
        [*torchrun, "-m", "tests.planning.kept_by_autograd", str(out), *layouts],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    for layout in layouts:
        split = ParallelConfig(**settings_of(layout))
        assert len(found[layout]) == len(shapes(split)) * len(DTYPES) * len(RECOMPUTE)
        # A context group also keeps the order of the row, 8 bytes a token, for a layer's keys and values.
        left_out = INDEX_BYTES * LENGTH + (16 * LENGTH * SHAPE.layers if split.context > 1 else 0)
        for kept, planned in found[layout]:
            assert 0 <= kept - planned <= left_out, (layout, kept, planned)


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that were made within and still exist; `most` is their peak.

    Args:
        before: tensors that were made before, whose views do not count.
    """

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "chunk"), [(16, 64), (256, 4)])
def test_the_logits_chunks_are_those_of_the_loss(
    hidden: int, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Chunks that are large beside everything else, as those of a real vocabulary are: of a number of logits,
    # or as large as the head's gradient.
    targets, vocab = 256, 4096
    monkeypatch.setattr(target_logprobs_module, "CPU_CHUNK_LOGITS", chunk * vocab)
    by_logits = partial(target_logprobs_module.chunk_targets, logits=chunk * vocab)
    monkeypatch.setattr("megatron_parallel_r1.planning.memory.chunk_targets", by_logits)
    hidden_NE = torch.randn(targets, hidden).to(dtype).requires_grad_()
    head_VE = torch.randn(vocab, hidden).to(dtype).requires_grad_()
    ids_N = torch.arange(targets)
    with Alive(hidden_NE, head_VE) as alive:
        question = LogprobQuery(ids_N, torch.full_like(ids_N, -1), 1.0, vocab)
        logprobs_N, entropies_N = target_logprobs(hidden_NE, head_VE, question)
        (logprobs_N.sum() + entropies_N.sum()).backward()
    shape = ModelConfig(hidden=hidden, layers=1, heads=1, kv_heads=1, head_dim=2, ffn=2, vocab=vocab)
    planned = logit_bytes(shape, ParallelConfig(), Workload(targets, 1), dtype.itemsize)
    # Beside whole chunks there are sums and indices of the targets, 1 % here; some of bfloat16 are halves.
    assert 0.98 * alive.most <= planned <= 1.2 * alive.most


def test_the_cache_has_room_for_every_trace_and_no_doubling_more() -> None:
    theirs = tiny_qwen3()
    shape = ModelConfig.from_hf(theirs.config.to_dict())
    engine = native_engine(theirs)
    thinking = Thinking(mode="replay", paths=3, max_blocks=2, max_path_tokens=40, max_response_tokens=200)
    prompts = [random_prompts(1)[0]] * 64
    traces = traces_of(engine, thinking, prompts)
    assert max(len(trace.tokens) for trace in traces) > 100 and any(trace.tree.blocks for trace in traces)
    decoder = engine._model
    assert decoder is not None
    slots = len(prompts[0]) + len(prompts) * longest_row(thinking, 0)
    assert held(decoder.cache_LSX) <= cache_bytes(shape, ParallelConfig(), slots, 4)
    # As many slots as there are need no more than those.
    assert held(decoder.cache_LSX) == cache_bytes(shape, ParallelConfig(), engine._table.slot_count, 4)


def test_micro_batches_under_way() -> None:
    pipeline = ParallelConfig(pipeline=4)
    assert [chunks_in_flight(pipeline, rank, 8) for rank in range(4)] == [4, 3, 2, 1]
    assert chunks_in_flight(pipeline, 0, 2) == 2
    # Interleaved: 1 + (p - 1) / (p v) times the layers of a pipeline of full micro-batches (arXiv 2205.05198,
    # section 4.2.3): of p v = 8 stages' worth, 8 + 3.
    interleaved = ParallelConfig(pipeline=4, virtual=2)
    assert [chunks_in_flight(interleaved, rank, 8) for rank in range(4)] == [11, 9, 7, 5]
    assert chunks_in_flight(interleaved, 0, 4) == 8


def test_copies_published_ahead_of_the_engine_are_counted() -> None:
    shape = ModelConfig(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64, vocab=40)
    (part,) = pipeline_parts(shape, ParallelConfig())
    in_turn, ahead = (
        memory_use(shape, ParallelConfig(), part, 1, 4, Workload(64, 1, slots=100, staleness=staleness))
        for staleness in (0, 2)
    )
    assert in_turn.engine == in_turn.weights and ahead.engine == 4 * ahead.weights
