"""Parallel-GSM8K's traces laid out as in SFT, or synthetic traces of similar lengths if it is absent."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.rows import trace_row
from megatron_parallel_r1.data.prompts import render
from megatron_parallel_r1.data.readers import read_examples
from megatron_parallel_r1.data.tokenizers import train_tokenizer
from megatron_parallel_r1.sft.loop import example_row
from megatron_parallel_r1.thought.layout import Row
from megatron_parallel_r1.thought.tags import TAG_TEXTS
from megatron_parallel_r1.thought.tokenizer import add_tags

VOCAB = 4096
# Deciles of the real traces' lengths in tokens, rounded, under the tokenizer trained here.
SYNTHETIC_LENGTHS = (200, 246, 275, 305, 335, 360, 395, 435, 485, 640)


@dataclass(frozen=True, slots=True)
class Traces:
    """Traces in `isolated` mode with ids below VOCAB; `source` describes them in a few words."""

    rows: list[Row]
    source: str


def load_traces(path: Path | None = None) -> Traces:
    """Loads a file, by default `parallel_gsm8k.parquet` in `data/` of MPR1_SHARED or `../shared`.

    Skips its two malformed traces. The byte-level BPE is trained on the traces themselves.
    """
    shared = Path(os.environ.get("MPR1_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    path = path or shared / "data" / "parallel_gsm8k.parquet"
    if not path.is_file():
        rows = [
            trace_row(length + i, "isolated", VOCAB, 2, 2) for i in range(16) for length in SYNTHETIC_LENGTHS
        ]
        return Traces(rows, f"{len(rows)} synthetic traces, as {path.name} is absent")
    examples = read_examples("Parallel-R1/Parallel-GSM8K", path, bad_rows="skip").items
    texts = [f"{render('plain', example.problem.prompt)}\n{example.response}" for example in examples]
    tokenizer = train_tokenizer(texts, VOCAB - len(TAG_TEXTS))
    tags = add_tags(tokenizer)
    rows = [example_row(example, tokenizer, tags, "plain", "isolated") for example in examples]
    return Traces(rows, f"{len(rows)} traces of {path.name}")


def additive_mask(layout_KL: Tensor) -> Tensor:
    """[1, 1, L, L] float32 for `transformers`: 0 where a token sees another, else the most negative value."""
    key_L = torch.arange(layout_KL.shape[1], dtype=torch.int32)
    index_L1, start_L1, *hidden_L1 = layout_KL[:, :, None]
    hidden_LL = (key_L < start_L1) | (index_L1 < key_L)
    for lo_L1, hi_L1 in zip(hidden_L1[::2], hidden_L1[1::2], strict=True):
        hidden_LL |= (lo_L1 <= key_L) & (key_L < hi_L1)
    bias_LL = torch.zeros(hidden_LL.shape).masked_fill_(hidden_LL, torch.finfo(torch.float32).min)
    return bias_LL[None, None]
