"""The benchmark of SFT runs, tiny, and the ways that it compares have the same loss."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import sft_throughput
from benchmarks.gpu.rows import trace_row
from benchmarks.real_traces import VOCAB, load_traces
from benchmarks.sft_throughput import ADAM, OURS, Theirs
from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.sft.loop import sft_step
from megatron_parallel_r1.train.trainer import Trainer


def test_every_way_has_a_rate(tmp_path: Path) -> None:
    table = sft_throughput.measure(tmp_path / "absent.parquet", tokens=300, layers=1, repeats=1)
    names = [row[0] for row in table.rows]
    assert names[0] == OURS and len(names) == 4
    for row in table.rows:
        assert all(re.match(r"\d", cell) for cell in row[1:] if cell)
        assert float(row[1].split()[0]) > 0
    assert "synthetic traces, as absent.parquet is absent" in table.note


def test_the_same_weights_have_the_same_loss_in_the_authors_way() -> None:
    """Both do the same work; the causally packed row sees more, so its loss differs."""
    shape = ModelConfig(32, 1, 4, 2, 8, ffn=48, vocab=64, max_positions=512)
    rows = [trace_row(100 + extra, "isolated", 64, blocks=1, paths=3) for extra in range(2)]
    found: list[torch.Tensor] = []
    theirs = Theirs(shape, length=120)
    loss = torch.nn.functional.cross_entropy
    with process.running(seed=1), pytest.MonkeyPatch.context() as patch:
        model = build_model(shape)
        load_hf_tensors(model, random_hf_tensors(shape, 0))
        ours = sft_step(Trainer(model, ADAM), rows[:1], 120, ADAM.lr).loss
        patch.setattr(
            torch.nn.functional, "cross_entropy", lambda *a, **k: found.append(loss(*a, **k)) or found[-1]
        )
        theirs.padded_dense(rows[:1])
        theirs.packed_causal(rows)
        theirs.packed_causal_targets(rows)
    assert abs(found[0].item() - ours) < 2e-6  # float32, a mean of some 90 numbers near 4
    # The two took a step of lr 1e-4 between them.
    assert found[1].item() == pytest.approx(found[2].item(), abs=1e-2)
    assert all(parameter.grad is None for parameter in theirs.model.parameters())


def test_synthetic_traces_are_like_the_real_ones(real_data: Path) -> None:
    real, synthetic = (load_traces(real_data / name) for name in ("parallel_gsm8k.parquet", "absent.parquet"))
    assert len(real.rows) == 279
    means = [sum(map(len, traces.rows)) / len(traces.rows) for traces in (real, synthetic)]
    assert means[1] == pytest.approx(means[0], rel=0.1)
    assert all(row.tokens_L.max() < VOCAB for traces in (real, synthetic) for row in traces.rows)
