"""What a run takes from the model that it begins as."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.data.embedded.generate import build_tokenizer as build_embedded_tokenizer
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.thought.tokenizer import add_tags, tag_subwords
from tests.unit.conversion.folders import write_hf
from tests.unit.data.test_tokenizer_trials import byte_tokenizer

RECIPE = """
name: made_up
model: {path: BASE}
tokenizer: {kind: folder}
thinking: {mode: isolated, paths: 2, max_path_tokens: 8, max_response_tokens: 64}
stages:
  - name: sft
    kind: sft
    data: {source: embedded_cold_start}
    steps: 1
    examples_per_step: 1
    optimizer: {lr: 1e-3}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_hf(tmp_path / "base", "llama tied", vocab_size=290)
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [7, 9], "temperature": 0.5}')
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("BASE", str(tmp_path / "base")))
    return tmp_path / "base"


def context(base: Path, *overrides: str) -> RunContext:
    return RunContext.set_up(read_recipe(base.parent / "recipe.yaml", overrides), base.parent / "run", False)


def test_every_eos_of_the_base_ends_a_response(base: Path) -> None:
    run = context(base)
    assert run.base == base and run.tags.ends == {7, 9, run.tokenizer.eos_token_id}
    (base / "generation_config.json").write_text('{"eos_token_id": 500}')
    with pytest.raises(UserError, match="eos_token_id 500 is beyond the tokenizer's"):
        context(base)
    # Another tokenizer has other ids.
    assert context(base, "tokenizer={kind: embedded}").tags.more_eos == ()


@pytest.mark.parametrize("way", ["subwords", "mean"])
def test_new_rows_begin_as_the_recipe_says(way: str, base: Path) -> None:
    run = context(base, *([] if way == "subwords" else [f"model.new_rows={way}"]))
    name = "model.embed_tokens.weight"
    old_VD = load_file(base / "model.safetensors")[name]
    new_VD = dict(run._start_tensors(run.recipe.stages[0]))[name]
    first = run.tags.parallel
    assert torch.equal(new_VD[:first], old_VD[:first])
    spread_D = old_VD.std(0)
    for tag, subwords in tag_subwords(run.tokenizer).items():
        centre_D = old_VD[subwords if way == "subwords" else slice(0, first)].mean(0)
        assert ((new_VD[tag] - centre_D) / spread_D).std() < 0.15, tag


def test_a_release_keeps_its_tags_under_another_tokenizer_with_the_same_ids(base: Path) -> None:
    tokenizer = build_embedded_tokenizer()
    add_tags(tokenizer)
    tokenizer.save_pretrained(base)
    run = context(base, "tokenizer={kind: embedded}")
    name = "model.embed_tokens.weight"
    assert run.new_ids == ()
    assert torch.equal(
        dict(run._start_tensors(run.recipe.stages[0]))[name], load_file(base / "model.safetensors")[name]
    )
    # Of a tokenizer whose ids are others all tags are new.
    byte_tokenizer().save_pretrained(base)
    assert len(context(base, "tokenizer={kind: embedded}").new_ids) == 6


def test_weights_that_do_not_fit_are_named_before_the_run(base: Path) -> None:
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(fields | {"intermediate_size": 5}))
    with pytest.raises(UserError, match="weights do not fit the model"):
        context(base)
    with pytest.raises(UserError, match="weights do not fit the model"):
        load_hf_folder(base)
