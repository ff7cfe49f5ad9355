"""What a run saves, with its tags' rows and its optimizer's state, becomes a Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
from megatron_parallel_r1.conversion.command import inspect_command, megatron_to_hf_command, verify_command
from megatron_parallel_r1.conversion.shard_plan import Target
from megatron_parallel_r1.conversion.to_hf import megatron_to_hf
from megatron_parallel_r1.conversion.to_megatron import hf_to_megatron
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import hf_tensors, load_hf_tensors
from megatron_parallel_r1.thought.tags import TAG_TEXTS
from megatron_parallel_r1.thought.tokenizer import spread_new_embeddings
from megatron_parallel_r1.train.checkpoints.folder import Checkpoints
from megatron_parallel_r1.train.trainer import Adam, Trainer
from tests.unit.conversion.folders import assert_equal, tensors_of, write_hf

pytestmark = pytest.mark.usefixtures("world")


def test_a_checkpoint_of_a_run_that_added_tags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "base", "qwen2 linear")
    shape, released = load_hf_folder(tmp_path / "base")
    rows = range(shape.vocab, shape.vocab + len(TAG_TEXTS))
    model = build_model(replace(shape, vocab=rows.stop))
    load_hf_tensors(model, ((name, with_rows(name, tensor, rows)) for name, tensor in released))
    trainer = Trainer(model, Adam(lr=1e-3))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(trainer, 7, {})
    checkpoints.settle()
    step = tmp_path / "checkpoints" / "step_000007"
    expected = {name: tensor.clone() for name, tensor in hf_tensors(model)}

    like = ("--like", str(tmp_path / "base"))
    assert megatron_to_hf_command([str(step), str(tmp_path / "hf"), *like]) == 0
    assert_equal(expected, tensors_of(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf/config.json").read_text())["vocab_size"] == rows.stop
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert torch.equal(theirs.get_input_embeddings().weight, expected["model.embed_tokens.weight"])
    capsys.readouterr()
    assert verify_command([str(step), str(tmp_path / "hf"), *like, "--no-logits"]) == 0
    assert inspect_command([str(step), *like, "--check"]) == 0
    output = capsys.readouterr().out
    assert "tensors of an optimizer's state" in output and f"vocabulary     {rows.stop}," in output

    # And from there on as any model with an odd vocabulary.
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", Target(2, 2))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_equal(expected, tensors_of(tmp_path / "back"))


def with_rows(name: str, tensor: torch.Tensor, rows: range) -> torch.Tensor:
    """As a run does that starts from a model without tags."""
    if name not in ("model.embed_tokens.weight", "lm_head.weight"):
        return tensor
    grown_VD = torch.nn.functional.pad(tensor, (0, 0, 0, len(rows)))
    spread_new_embeddings(grown_VD, rows, seed=1)
    return grown_VD
