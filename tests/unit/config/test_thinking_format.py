"""The recipe's format of parallel thinking, read and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.thought.format_settings import format_of, stored_format
from megatron_parallel_r1.thought.formats import FORMATS, NPR, PARALLEL_R1
from tests.curriculum.test_run import RECIPE

OWN = {"base": "npr", "path": "<way>", "path_begin": "<way>{number}.", "max_paths": 3, "bad_plan": "end"}


def test_a_name_or_a_mapping_describes_a_format(tmp_path: Path) -> None:
    assert format_of(Thinking().format) == PARALLEL_R1 and "format" not in Thinking().model_dump()
    thinking = Thinking.read({"format": OWN}, "recipe")
    format = format_of(thinking.format)
    assert format.path == "<way>" and format.plan == NPR.plan and thinking.most_paths == 3
    assert Thinking.read(thinking.model_dump(mode="json"), "again") == thinking
    bare = Thinking.read({"format": {"base": "multiverse", "plan": None}, "paths": 5}, "recipe")
    assert format_of(bare.format).plan is None and bare.most_paths == 5
    file = tmp_path / "thinking.json"
    assert stored_format(file) == PARALLEL_R1
    for name, known in FORMATS.items():
        file.write_text(json.dumps(Thinking(format=name).model_dump()))
        assert stored_format(file) == known
    file.write_text('{"format": "other"}')
    with pytest.raises(UserError, match="format: unknown format"):
        stored_format(file)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["thinking.format=nrp"], "thinking.format: unknown format; use parallel_r1, multiverse, npr"),
        (["thinking.format.base=npr", "thinking.format.opne=<a>"], "opne: unknown key; did you mean open"),
        (["thinking.format.base=npr", "thinking.format.path=<a>"], "must be <a> with text behind it"),
        (["thinking.format.base=npr", "thinking.format.max_paths=9"], "max_paths: Input should be less than"),
        (["stages.rl.thinking.format=npr"], "stage rl: thinking.format is one for the whole run"),
        (["thinking.format=npr", "prompt_template=parallel"], "describes the tags of parallel_r1"),
    ],
)
def test_a_format_that_cannot_be_is_refused_in_one_line(words: list[str], what: str) -> None:
    with pytest.raises(UserError) as error:
        read_recipe(RECIPE, words)
    assert what in str(error.value) and "\n" not in str(error.value)
