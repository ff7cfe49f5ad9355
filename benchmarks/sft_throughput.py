"""Useful tokens/s of an SFT step, compared with the authors' method and with a practical upper bound.

    python -m benchmarks.sft_throughput [--data FILE.parquet] [--tokens 4096] [--layers 4] [--repeats 3]
                                        [--threads 1] [--write]

Trains one Qwen3-shaped model in float32 on Parallel-GSM8K's traces in four alternating ways, each with
forward, backward, gradient clipping and AdamW:

    this project              `sft_step`: traces packed into one row, `isolated`, packing and layout included
    padded, dense mask        `transformers`: one trace per row, padded to --tokens, with an additive mask of
                              tokens x tokens, as in the authors' released code
    packed, causal            `transformers` on the packed row with its causal flag and no mask, so that
                              traces and paths see each other: not the same training, but a practical upper
                              bound
    packed, causal, targets   the same, with logits of the targets only

Useful tokens are those of traces; padding does not count. All four have the same loss, the mean over the same
targets. Ours computes logits of targets only, in chunks, twice; `transformers` for every token, except in the
last way. Ours also reports entropies. A ratio above 1 means that ours is faster. The ratio of CPU times is a
check on machines with other load.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.page import Table, add_write_option, publish
from benchmarks.real_traces import VOCAB, additive_mask, load_traces
from benchmarks.side_by_side import alternate, ratios, spread
from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.sft.loop import sft_step
from megatron_parallel_r1.thought.layout import Row
from megatron_parallel_r1.thought.packing import PackedRow, concatenate, first_fit, pad
from megatron_parallel_r1.train.trainer import Adam, Trainer

ADAM = Adam(lr=1e-4)
OURS = "this project"


@dataclass(slots=True)
class Way:
    """One way to train on its rows, with the CPU seconds per token of each call."""

    step: Callable[[list[Row]], object]
    rows: list[Row]
    cpu: list[float] = field(default_factory=list)

    def rate(self) -> float:
        """Runs one step; returns useful tokens per second."""
        tokens = sum(map(len, self.rows))
        cpu, began = time.process_time(), time.perf_counter()
        self.step(self.rows)
        seconds = time.perf_counter() - began
        self.cpu.append((time.process_time() - cpu) / tokens)
        return tokens / seconds


class Theirs:
    """A model of `transformers` with torch's AdamW."""

    def __init__(self, shape: ModelConfig, length: int) -> None:
        self.length = length
        config = AutoConfig.for_model(**shape.to_hf())
        self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        self.model.load_state_dict(dict(random_hf_tensors(shape, 0)), strict=False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), ADAM.lr, ADAM.betas, ADAM.eps, weight_decay=ADAM.weight_decay, fused=True
        )

    def padded_dense(self, rows: list[Row]) -> None:
        for index in range(len(rows)):
            packed = pad(concatenate(rows, [index]), self.length)
            mask_11LL = additive_mask(torch.from_numpy(packed.layout_KL))
            positions_1L = torch.from_numpy(packed.positions_L).long()[None]
            self._backward(packed, len(rows), attention_mask=mask_11LL, position_ids=positions_1L)
        self._update()

    def packed_causal(self, rows: list[Row]) -> None:
        self._backward(concatenate(rows, range(len(rows))))
        self._update()

    def packed_causal_targets(self, rows: list[Row]) -> None:
        packed = concatenate(rows, range(len(rows)))
        at_N = torch.from_numpy(packed.labels_L >= 0).nonzero()[:, 0]
        self._backward(packed, at_N=at_N, logits_to_keep=at_N)
        self._update()

    def _backward(
        self,
        packed: PackedRow,
        parts: int = 1,
        at_N: torch.Tensor | None = None,
        **arguments: torch.Tensor,
    ) -> None:
        tokens_1L, labels_1L = (
            torch.from_numpy(array).long()[None] for array in (packed.tokens_L, packed.labels_L)
        )
        logits_LV = self.model(tokens_1L, use_cache=False, **arguments).logits[0]
        labels_L = labels_1L[0] if at_N is None else labels_1L[0, at_N]
        (F.cross_entropy(logits_LV, labels_L, ignore_index=-1) / parts).backward()

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), ADAM.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="Parallel-GSM8K as a Parquet file")
    parser.add_argument(
        "--tokens", type=int, default=4096, help="tokens of a packed row, and of a padded row"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    add_write_option(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    table = measure(args.data, args.tokens, args.layers, args.repeats)
    publish("sft_throughput", [table], f"CPU, {args.threads} thread, torch {torch.__version__}", args.write)


def measure(data: Path | None, tokens: int, layers: int, repeats: int) -> Table:
    """Measures the four ways side by side."""
    traces = load_traces(data)
    shape = ModelConfig(256, layers, 8, 4, 32, ffn=768, vocab=VOCAB, max_positions=max(4096, tokens))
    fitting = [row for row in traces.rows if len(row) <= tokens]
    packed_rows = [
        fitting[index]
        for index in first_fit([len(row) for row in fitting], tokens)[-1 if len(fitting) < 20 else 5]
    ]
    mean = sum(map(len, fitting)) / len(fitting)
    alone = min(fitting, key=lambda row: abs(len(row) - mean))
    with process.running(seed=1):
        model = build_model(shape)
        load_hf_tensors(model, random_hf_tensors(shape, 0))
        trainer = Trainer(model, ADAM)
        theirs = Theirs(shape, tokens)
        ways = {
            OURS: Way(lambda rows: sft_step(trainer, rows, tokens, ADAM.lr), packed_rows),
            "`transformers`: padded, dense mask": Way(theirs.padded_dense, [alone]),
            "`transformers`: packed, causal": Way(theirs.packed_causal, packed_rows),
            "`transformers`: packed, causal, targets": Way(theirs.packed_causal_targets, packed_rows),
        }
        rates = alternate({name: way.rate for name, way in ways.items()}, repeats)
    cpu = {name: way.cpu[1:] for name, way in ways.items()}
    rows = [
        [
            name,
            spread(rates[name], ".0f"),
            *(["", ""] if name == OURS else _ratios(rates, cpu, name)),
        ]
        for name in ways
    ]
    packed = concatenate(packed_rows, range(len(packed_rows)))
    return Table(
        f"SFT: useful tokens per second, {layers} layers of 256, vocabulary {VOCAB}, float32",
        ("", "useful tokens/s", "ours by theirs", "the same in CPU time"),
        rows,
        f"{repeats} repeats; median (lowest to highest). {traces.source}, {mean:.0f} tokens on average: "
        f"{len(packed_rows)} in a row of {len(packed)}, {packed.target_count} with loss; one of {len(alone)} "
        f"in a padded row of {tokens}. `transformers` without a mask lets traces and paths see each other.",
    )


def _ratios(rates: dict[str, list[float]], cpu: dict[str, list[float]], name: str) -> list[str]:
    return [
        f"{spread(values, '.2f')} times"
        for values in (ratios(rates[OURS], rates[name]), ratios(cpu[name], cpu[OURS]))
    ]


if __name__ == "__main__":
    main()
