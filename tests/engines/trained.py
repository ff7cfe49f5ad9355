"""A trainer's model with weights drawn by a seed, and its log-probs as the probe of a sync asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.checkpoint_formats.hf_folder import save_hf_folder
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.model.weights import load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.sync.control import RowScores, TokenRow
from megatron_parallel_r1.sync.probe import OutputHead
from megatron_parallel_r1.train.logprob_runner import LogprobRunner, causal_logprobs, probe_texts
from tests.serve.release import tokenizer

# A head size that vLLM's CPU attention knows; 97 tokens: no tensor group divides them.
SHAPE = ModelConfig(
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ffn=96,
    vocab=97,
    rope_theta=1e4,
    max_positions=1024,
)
ROWS: tuple[TokenRow, ...] = probe_texts(SHAPE.vocab, count=3, length=24)
# Server and trainer sum in another order: the project's promise in float32, in nats.
EXACT = 2e-5


def draw(model: Model, seed: int) -> None:
    """Sets weights that differ with the seed, and log-probs with them by nats."""
    load_hf_tensors(model, random_hf_tensors(model.architecture, seed, std=0.2))


def write_drawn(folder: Path, shape: ModelConfig, seed: int) -> Path:
    """The same weights as a folder that a server starts from."""
    save_hf_folder(folder, shape, random_hf_tensors(shape, seed, std=0.2), tokenizer())
    return folder


class Trained:
    """`probe.Expected` of a model, by Megatron's schedule."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, rows: Sequence[TokenRow], head: OutputHead | None) -> list[RowScores]:
        scorer = LogprobRunner(self.model, head_VE=head.rows_VE if head else None)
        return causal_logprobs(scorer, rows, capacity=256)
