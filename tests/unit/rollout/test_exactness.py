"""The promise of the engine: a sampled token's log-prob is what a recomputation under its layout gives.

The referee here is `transformers` with a dense mask; tests/unit/train holds the trainer to the same traces.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.thought.layout import Mode, lay_out
from megatron_parallel_r1.thought.packing import pack
from megatron_parallel_r1.thought.trace import Trace
from tests.reference.traces import TAGS
from tests.unit.rollout.tiny import (
    native_engine,
    random_prompts,
    tiny_qwen3,
    traces_of,
    transformers_logprobs,
)

TOLERANCE = 2e-5  # float32, logits of some units: a few hundred roundings of 6e-8


def largest_difference(model: torch.nn.Module, traces: list[Trace], mode: Mode) -> float:
    rows = [lay_out(t.prompt, t.tokens, t.sampled, t.tree, mode) for t in traces]
    worst = 0.0
    for packed in pack(rows, capacity=500):
        expected_LV = transformers_logprobs(model, packed, traces)
        at = np.flatnonzero(packed.labels_L >= 0)
        expected = expected_LV[at, packed.labels_L[at].astype(np.int64)].numpy()
        drawn = packed.gather([t.logprobs for t in traces])[at]
        worst = max(worst, float(np.abs(expected - drawn).max()))
    return worst


@pytest.mark.parametrize("mode", ["isolated", "replay", "causal", "sequential"])
@pytest.mark.parametrize("depth", [1, 2])
def test_logprobs_equal_a_recomputation(mode: Mode, depth: int) -> None:
    model = tiny_qwen3()
    engine = native_engine(model)
    prompts = random_prompts(24)
    thinking = Thinking(mode=mode, max_blocks=3, max_depth=depth, max_path_tokens=20, max_response_tokens=110)
    paths = [1 + index % 8 for index in range(24)]
    traces = traces_of(engine, thinking, prompts, paths=paths)
    if mode == "sequential":
        assert all(not trace.tree.blocks for trace in traces)
    else:
        assert max(trace.tree.depth for trace in traces) == depth
        assert {len(b.paths) for t in traces for _, b in t.tree.all_blocks()} >= {1, 2, 4, 8}
        assert sum(len(trace.tree.blocks) > 1 for trace in traces) >= 4
    assert "eos" in {trace.finish for trace in traces}
    assert largest_difference(model, traces, mode) <= TOLERANCE


def test_eos_and_length_cuts_inside_paths() -> None:
    model = tiny_qwen3(seed=1)
    thinking = Thinking(paths=3, max_path_tokens=3, max_response_tokens=60, max_critical_tokens=40)
    traces = traces_of(native_engine(model), thinking, random_prompts(40, seed=1))
    cuts = {"eos": 0, "length": 0, "closed": 0}
    for trace in traces:
        for _, block in trace.tree.all_blocks():
            for path in block.paths:
                if trace.sampled[path.stop - 1]:
                    cuts["closed"] += 1
                else:
                    cuts["eos" if trace.tokens[path.stop - 2] == 6 else "length"] += 1
    assert min(cuts.values()) >= 3, cuts
    assert largest_difference(model, traces, "isolated") <= TOLERANCE


def test_temperature_is_part_of_the_logprob() -> None:
    model = tiny_qwen3(seed=2)
    thinking = Thinking(temperature=0.5, max_response_tokens=30, mode="sequential")
    (trace,) = traces_of(native_engine(model), thinking, [[9, 10]])
    row = pack([lay_out(trace.prompt, trace.tokens, trace.sampled, trace.tree, "sequential")], 64)[0]
    with torch.no_grad():
        logits_LV = model(torch.from_numpy(row.tokens_L).long()[None]).logits[0]
    logits_LV[:, TAGS.parallel] = -torch.inf
    expected = (logits_LV / 0.5).log_softmax(-1)[torch.arange(1, 1 + len(trace.tokens)), trace.tokens]
    assert np.abs(expected.numpy() - trace.logprobs).max() <= TOLERANCE


def test_isolated_computes_each_token_once() -> None:
    engine = native_engine(tiny_qwen3())
    prompts = random_prompts(4)
    thinking = Thinking(paths=4, max_path_tokens=20, max_response_tokens=200)
    traces = traces_of(engine, thinking, [prompts[index % 4] for index in range(16)])
    # The prompts once for their four traces; of a trace all but the last token, which nobody reads.
    once = sum(map(len, prompts)) + sum(len(trace.tokens) - 1 for trace in traces)
    assert engine.computed_tokens == once
    assert sum(len(trace.tree.blocks) for trace in traces) > 8


def test_a_trace_depends_on_its_seed_and_not_on_its_company() -> None:
    model = tiny_qwen3()
    thinking = Thinking(paths=3, max_path_tokens=20, max_response_tokens=250)
    prompts = random_prompts(12)
    together = traces_of(native_engine(model), thinking, prompts)
    alone = [
        traces_of(native_engine(model, max_rows=3), thinking, [prompt], [seed])[0]
        for seed, prompt in enumerate(prompts)
    ]
    assert [trace.tokens for trace in together] == [trace.tokens for trace in alone]
    few = traces_of(native_engine(model), thinking, prompts, concurrent=2)
    assert [trace.tokens for trace in together] == [trace.tokens for trace in few]


@pytest.mark.slow
def test_compiled_layers_are_exact_and_new_weights_need_no_new_ones() -> None:
    engine = native_engine(tiny_qwen3(), compiled=True)
    thinking = Thinking(paths=3, max_path_tokens=20, max_response_tokens=90)
    traces_of(engine, thinking, random_prompts(12))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    model = tiny_qwen3(seed=1)
    engine.load_weights(model.state_dict().items(), version=1)
    traces = traces_of(engine, thinking, random_prompts(12))
    assert counters["stats"]["unique_graphs"] == graphs
    assert largest_difference(model, traces, "isolated") <= TOLERANCE
