"""Evaluation of a folder with a recipe's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_parallel_r1.cli.training import evaluate
from megatron_parallel_r1.errors import UserError
from tests.unit.conversion.folders import write_hf
from tests.unit.data.test_tokenizer_trials import byte_tokenizer

RECIPE = """
name: untrained
model: {path: BASE}
tokenizer: {kind: folder}
thinking: {mode: sequential, max_response_tokens: 8}
stages:
  - name: rl
    kind: rl
    data: {source: embedded}
    steps: 1
    prompts_per_step: 1
    samples_per_prompt: 2
    optimizer: {lr: 1e-3}
evaluation: {data: {source: embedded}, problems: 3}
"""


def test_a_model_without_tags_is_evaluated_in_sequential_mode_before_any_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, recipe = tmp_path / "base", tmp_path / "recipe.yaml"
    write_hf(base, "llama tied", vocab_size=290)
    byte_tokenizer().save_pretrained(base)
    recipe.write_text(RECIPE.replace("BASE", str(base)))
    # Greedy decoding is no way to train by RL, but nothing is trained here.
    evaluate(recipe, ["thinking.temperature=0"], base)
    assert "sequential" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no token for <Parallel>.*or mode sequential"):
        evaluate(recipe, ["thinking.mode=isolated"], base)
