"""Prompts and worked examples that are longer than the recipe allows are not trained on, and are counted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.data.row_cache import RowCache
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.run.datasets import example_rows, load_tokenizer, problem_stream
from megatron_parallel_r1.sft.loop import example_row
from megatron_parallel_r1.thought.tokenizer import add_tags
from tests.curriculum.test_decontamination import LONG, RECIPE, rows, words_of

QUESTIONS = ["What is two plus two?", LONG.format("three"), "What is six times six?"]


@pytest.mark.parametrize("buffer", ["", ", buffer: 2"])
def test_long_prompts_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture, buffer: str) -> None:
    data = rows(tmp_path / "train.jsonl", QUESTIONS).removesuffix("}") + buffer + "}"

    def prompts_below(most: int) -> set[str]:
        recipe = read_recipe(RECIPE, [f"stages.rl.data={data}", f"max_prompt_tokens={most}"])
        stream = problem_stream(recipe, recipe.stages[1], 1, words_of)
        return {problem.prompt for problem in stream.next_batch(9)}

    assert prompts_below(99) == set(QUESTIONS) and capsys.readouterr().err == ""
    assert prompts_below(5) == {QUESTIONS[0], QUESTIONS[2]}
    message = "stage rl: 1 of 3 have more than 5 tokens (max_prompt_tokens), left out\n"
    assert capsys.readouterr().err == message
    with pytest.raises(UserError, match=r"stage rl: nothing of its data has at most 4 .* max_prompt_tokens"):
        prompts_below(4)


@pytest.mark.parametrize("buffer", ["", ", buffer: 2"])
def test_long_examples_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture, buffer: str) -> None:
    lines = [f'{{"q": "{length}", "r": "{"1 " * length}", "a": "1"}}\n' for length in (3, 40, 5)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    columns = "columns: {prompt: q, response: r, answer: a}"
    data = f"{{source: dataset, name: custom, path: {tmp_path / 'train.jsonl'}, {columns}{buffer}}}"

    def lengths(*more: str) -> set[int]:
        words = [f"stages.cold_start.data={data}", "stages.cold_start.held_out_examples=0"]
        recipe = read_recipe(RECIPE, [*words, *more])
        tokenizer = load_tokenizer(recipe)
        tags = add_tags(tokenizer)
        to_row = partial(example_row, tokenizer=tokenizer, tags=tags, template="plain", mode="isolated")
        cache = RowCache(tmp_path / "rows", "made here", "plain", "isolated")
        stream = example_rows(recipe, recipe.stages[0], 1, to_row, cache)
        return {len(row) for row in stream.next_batch(9)}

    shortest, middle, longest = sorted(lengths())
    assert (middle - shortest, longest - middle) == (2, 35)
    assert lengths(f"max_example_tokens={middle}") == {shortest, middle}
    assert "stage cold_start: 1 of 3 have more than" in capsys.readouterr().err
    with pytest.raises(UserError, match="stage cold_start: nothing of its data has at most 1 tokens"):
        lengths("max_example_tokens=1")
