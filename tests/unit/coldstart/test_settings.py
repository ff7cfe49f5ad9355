"""Settings from a file's values, and what a user may get wrong in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_parallel_r1.coldstart.settings import ColdStart, OwnEngine, TeacherEndpoint
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.settings import Thinking
from tests.unit.coldstart.written_traces import settings_tree


def tree() -> dict[str, Any]:
    return settings_tree("http://127.0.0.1:9/v1", Path("problems.jsonl"), Path("out"))


def test_both_teachers() -> None:
    settings = ColdStart.read(tree(), "a.yaml")
    assert isinstance(settings, ColdStart) and isinstance(settings.teacher, TeacherEndpoint)
    assert settings.out == Path("out") and settings.balance.ratio is None
    engine = {"kind": "engine", "path": "model", "thinking": {"paths": 3}}
    settings = ColdStart.read(tree() | {"teacher": engine}, "a.yaml")
    assert settings.teacher == OwnEngine(kind="engine", path=Path("model"), thinking=Thinking(paths=3))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("teecher", {}, "teecher: unknown key; did you mean teacher?"),
        ("template", "poem", "'poem' is no template: use plain, "),
        ("template", "sequential", "set check.parallel: false"),
        ("samples", 0, "samples: Input should be greater than or equal to 1"),
        ("concurrency", "many", "concurrency: "),
        ("check", {"max_chars": 0}, "check.max_chars: Input should be greater than or equal to 1"),
        ("balance", {"ratio": 0.5}, "balance.ratio: Input should be greater than or equal to 1"),
        (
            "data",
            {"name": "openai/gsm8k", "limit": 0},
            "data.limit: Input should be greater than or equal to 1",
        ),
        ("data", {"name": "custom", "columns": {"prompt": "q"}}, "data.columns.answer: "),
        ("data", {"name": "custom", "columns": {"prompt": "q", "answer": "a", "gold": "g"}}, "gold: unknown"),
        ("teacher", {"kind": "oracle"}, "teacher: "),
    ],
)
def test_what_cannot_be(key: str, value: Any, says: str) -> None:
    with pytest.raises(UserError, match=r"a\.yaml: ") as raised:
        ColdStart.read(tree() | {key: value}, "a.yaml")
    assert says in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("url", "ftp://a", "must begin with http"),
        ("url", "http://me:secret@a/v1", "must not hold a password"),
        ("url", "http://a/v1/chat/completions", "leave that out"),
        ("model", " ", "model must be named"),
        ("timeout_s", 0, "timeout_s: Input should be greater than 0"),
        ("longest_wait_s", 0.001, "longest_wait_s must be >= backoff_s"),
        ("api", "soap", "api"),
    ],
)
def test_endpoints_that_cannot_be(key: str, value: Any, says: str) -> None:
    values = tree()
    values["teacher"][key] = value
    with pytest.raises(UserError, match="teacher") as raised:
        ColdStart.read(values, "a.yaml")
    assert says in str(raised.value)
    assert "secret" not in str(raised.value)
