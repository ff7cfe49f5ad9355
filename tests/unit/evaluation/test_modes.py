"""Modes, and what each makes of a checkpoint's own decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_parallel_r1.data.prompts import TEMPLATES
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.modes import Decoding, EvaluationMode, decoding_of
from megatron_parallel_r1.rollout.settings import Thinking

STORED = Decoding(Thinking(mode="replay", paths=5, max_response_tokens=900), TEMPLATES["parallel"])
PLAIN = replace(STORED, template="{problem}")


def test_modes_by_name() -> None:
    assert EvaluationMode.of("majority@16") == EvaluationMode("majority", 16)
    for text in ("parallel", "sequential", "majority@4"):
        assert str(EvaluationMode.of(text)) == text


@pytest.mark.parametrize(
    "text", ["", "majority", "majority@", "majority@1", "majority@0", "Parallel", "majority@-2"]
)
def test_unknown_modes(text: str) -> None:
    with pytest.raises(UserError, match="use parallel, sequential or majority@k"):
        EvaluationMode.of(text)


def test_parallel_is_what_is_stored() -> None:
    assert decoding_of(EvaluationMode("parallel"), STORED) == STORED


@pytest.mark.parametrize("mode", [EvaluationMode("sequential"), EvaluationMode("majority", 4)])
def test_sequential_keeps_the_limits_and_asks_for_no_blocks(mode: EvaluationMode) -> None:
    found = decoding_of(mode, STORED)
    assert found == Decoding(STORED.thinking.replace(mode="sequential"), TEMPLATES["sequential"])
    assert decoding_of(mode, PLAIN).template == "{problem}"


def test_flags_win() -> None:
    found = decoding_of(
        EvaluationMode("parallel"), STORED, ["paths=2", "temperature=0.6", "mode=isolated"], "plain"
    )
    assert (found.thinking.paths, found.thinking.temperature, found.thinking.mode) == (2, 0.6, "isolated")
    assert found.thinking.max_response_tokens == 900 and found.template == "{problem}"
    assert decoding_of(EvaluationMode("sequential"), STORED, (), "Q: {problem}").template == "Q: {problem}"


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (["path=2"], "write key=value, with a key of mode, paths"),
        (["paths"], "write key=value"),
        (["paths=nine"], "paths"),
        (["paths=9"], "paths: Input should be less than or equal to 8"),
        (["mode=circular"], "mode"),
        (["paths={"], "not valid YAML"),
    ],
)
def test_bad_settings(settings: list[str], what: str) -> None:
    with pytest.raises(UserError, match=what):
        decoding_of(EvaluationMode("parallel"), STORED, settings)


def test_contradictions() -> None:
    sequential = replace(STORED, thinking=STORED.thinking.replace(mode="sequential"))
    with pytest.raises(UserError, match="--mode sequential"):
        decoding_of(EvaluationMode("parallel"), sequential)
    assert decoding_of(EvaluationMode("parallel"), sequential, ["mode=isolated"]).thinking.mode == "isolated"
    with pytest.raises(UserError, match="has no blocks"):
        decoding_of(EvaluationMode("sequential"), STORED, ["mode=isolated"])
    with pytest.raises(UserError, match="--prompt 'paralel'"):
        decoding_of(EvaluationMode("parallel"), STORED, (), "paralel")
