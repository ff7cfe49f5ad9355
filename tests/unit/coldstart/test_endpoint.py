"""The endpoint's client against a server that misbehaves."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from megatron_parallel_r1.coldstart.endpoint_teacher import (
    BadReply,
    backoff_s,
    open_endpoint,
    read_reply,
    retry_after_s,
)
from megatron_parallel_r1.coldstart.settings import TeacherEndpoint
from megatron_parallel_r1.coldstart.teacher import NoAnswer, TeacherAnswer, TeacherRequest
from megatron_parallel_r1.errors import UserError
from tests.unit.coldstart.fake_teacher import Body, FakeTeacher, Reply, chat, completion, fault
from tests.unit.coldstart.written_traces import posed

GOOD = chat("Final Answer: 6")


def endpoint_settings(url: str, changes: dict[str, Any] | None = None) -> TeacherEndpoint:
    quick = {"timeout_s": 5.0, "backoff_s": 0.01, "longest_wait_s": 0.05, "retries": 3, "give_up_after": 99}
    return TeacherEndpoint(kind="endpoint", url=url, model="fake", **(quick | (changes or {})))


def ask(endpoint: TeacherEndpoint, count: int = 1) -> list[TeacherAnswer | BaseException]:
    async def all_of_them() -> list[TeacherAnswer | BaseException]:
        async with open_endpoint(endpoint, concurrency=8) as teacher:
            requests = [TeacherRequest.of(posed(number), 0, "plain", seed=0) for number in range(count)]
            return await asyncio.gather(*map(teacher.answer, requests), return_exceptions=True)

    return asyncio.run(all_of_them())


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-secret\n")
    with FakeTeacher(lambda body, tried: GOOD).running() as teacher:
        changes = {"key_variable": "TEACHER_KEY", "max_tokens": 9, "body": {"top_p": 0.9, "seed": None}}
        assert ask(endpoint_settings(teacher.url + "/", changes)) == [
            TeacherAnswer("Final Answer: 6", "stop")
        ]
    ((path, headers, body),) = teacher.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-secret"
    assert body == {
        "model": "fake",
        "messages": [{"role": "user", "content": "What is 0 plus 0?"}],
        "temperature": 0.8,
        "max_tokens": 9,
        "top_p": 0.9,
    }


def test_plain_completions() -> None:
    with FakeTeacher(lambda body, tried: completion("so", "length")).running() as teacher:
        assert ask(endpoint_settings(teacher.url, {"api": "completions"})) == [TeacherAnswer("so", "length")]
    ((path, headers, body),) = teacher.requests
    assert path == "/v1/completions" and body["prompt"] == "What is 0 plus 0?\n"
    assert "Authorization" not in headers and isinstance(body["seed"], int)


@pytest.mark.parametrize(
    "trouble",
    [
        fault(429, Retry_After="0"),
        fault(500),
        fault(503, Retry_After="no date at all"),
        fault(408),
        Reply(b"<html>busy</html>"),
        Reply(b'{"choices": [{"message": {"content": "Fi'),
        Reply(b'{"error": {"message": "overloaded"}}'),
        Reply(b'{"choices": [{"message": {"content": 7}}]}'),
        Reply(GOOD.body, cut=True),
        Reply(GOOD.body, headers={"Content-Encoding": "gzip"}),
    ],
)
def test_trouble_that_passes(trouble: Reply) -> None:
    with FakeTeacher(lambda body, tried: trouble if tried < 2 else GOOD).running() as teacher:
        assert ask(endpoint_settings(teacher.url)) == [TeacherAnswer("Final Answer: 6", "stop")]
    assert len(teacher.requests) == 3


@pytest.mark.parametrize("slow", [Reply(GOOD.body, delay_s=30), Reply(GOOD.body, drip_s=0.1)])
def test_hangs_are_cut_and_tried_again(slow: Reply) -> None:
    begun = time.monotonic()
    with FakeTeacher(lambda body, tried: slow if tried == 0 else GOOD).running() as teacher:
        assert ask(endpoint_settings(teacher.url, {"timeout_s": 1.0})) == [
            TeacherAnswer("Final Answer: 6", "stop")
        ]
        # The hanging reply would take 30 s, the dripping one 8 s; a try may take 1 s.
        assert time.monotonic() - begun < 7


def test_retry_after_is_honoured() -> None:
    arrivals: list[float] = []

    def behave(body: Body, tried: int) -> Reply:
        arrivals.append(time.monotonic())
        return fault(429, Retry_After="1") if tried == 0 else GOOD

    with FakeTeacher(behave).running() as teacher:
        ask(endpoint_settings(teacher.url))
    assert arrivals[1] - arrivals[0] >= 1.0


def test_a_pause_beyond_patience_is_not_waited_for() -> None:
    with FakeTeacher(lambda body, tried: fault(429, Retry_After="7200")).running() as teacher:
        (failure,) = ask(endpoint_settings(teacher.url))
    assert isinstance(failure, NoAnswer) and len(teacher.requests) == 1


def test_a_netrc_does_not_replace_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("default login someone password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    with FakeTeacher(lambda body, tried: GOOD).running() as teacher:
        assert ask(endpoint_settings(teacher.url, {"key_variable": "TEACHER_KEY"})) == [
            TeacherAnswer("Final Answer: 6", "stop")
        ]
    assert teacher.requests[0][1]["Authorization"] == "Bearer sk-secret"


def test_the_environments_proxy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with FakeTeacher(lambda body, tried: GOOD).running() as proxy:
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        assert ask(endpoint_settings("http://teacher.invalid/v1")) == [
            TeacherAnswer("Final Answer: 6", "stop")
        ]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert ask(endpoint_settings(proxy.url)) == [TeacherAnswer("Final Answer: 6", "stop")]
    assert [path for path, _, _ in proxy.requests] == [
        "http://teacher.invalid/v1/chat/completions",
        "/v1/chat/completions",
    ]


def test_unanswered_after_all_tries() -> None:
    with FakeTeacher(lambda body, tried: fault(502)).running() as teacher:
        (failure,) = ask(endpoint_settings(teacher.url))
    assert isinstance(failure, NoAnswer) and str(failure) == "status 502"
    assert len(teacher.requests) == 4


def test_a_dead_endpoint_ends_the_run() -> None:
    with FakeTeacher(lambda body, tried: GOOD).running() as teacher:
        url = teacher.url
    failures = ask(endpoint_settings(url, {"give_up_after": 3, "retries": 0}), count=3)
    # They were sent together, and the last to fail gives up.
    assert Counter(map(type, failures)) == {NoAnswer: 2, UserError: 1}
    assert any("3 requests in a row stayed without an answer" in str(failure) for failure in failures)


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        (fault(401), r"status 401, it refuses the key in TEACHER_KEY"),
        (fault(404), r"status 404, it has no model 'fake' or no such address"),
        (fault(400, "bad seed of sk-secret"), r"refuses the request \(bad seed of …\)"),
        (Reply(b"not json", 422), r"refuses the request \(no message\)"),
        (Reply(b'["odd"]', 422), r"refuses the request \(no message\)"),
        (Reply(b"", 307, {"Location": "http://b/"}), r"redirects to http://b/; set teacher.url to that"),
    ],
)
def test_trouble_to_mend(trouble: Reply, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    with FakeTeacher(lambda body, tried: trouble).running() as teacher:
        (failure,) = ask(endpoint_settings(teacher.url, {"key_variable": "TEACHER_KEY"}))
    assert isinstance(failure, UserError) and len(teacher.requests) == 1
    with pytest.raises(UserError, match=says):
        raise failure
    assert "sk-secret" not in str(failure) and "\n" not in str(failure)


def test_a_filtered_prompt_is_a_refusal() -> None:
    with FakeTeacher(lambda body, tried: fault(400, code="content_filter")).running() as teacher:
        assert ask(endpoint_settings(teacher.url)) == [TeacherAnswer("", "refused")]


def test_keys_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = endpoint_settings("http://127.0.0.1:9/v1", {"key_variable": "TEACHER_KEY"})
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(UserError, match="TEACHER_KEY is not set"):
        ask(endpoint)
    monkeypatch.setenv("TEACHER_KEY", "sk-sécret")
    with pytest.raises(UserError, match="holds no valid key") as raised:
        ask(endpoint)
    assert "cret" not in str(raised.value).replace("TEACHER_KEY", "")


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (chat("<think>hm</think>\nsix"), TeacherAnswer("\nsix", "stop")),
        (chat("hm</think>six"), TeacherAnswer("six", "stop")),
        (chat("<think>hm and hm", "length"), TeacherAnswer("", "length")),
        (chat(None, refusal="no"), TeacherAnswer("", "refused")),
        (chat("six", "content_filter"), TeacherAnswer("six", "refused")),
        (Reply(rb'{"choices": [{"message": {"content": "a\ud800"}}]}'), TeacherAnswer("a?", "stop")),
    ],
)
def test_replies(reply: Reply, answer: TeacherAnswer) -> None:
    assert read_reply(reply.body, "chat") == answer


@pytest.mark.parametrize(
    "body", [b"[]", b"null", b"{}", b'{"choices": {}}', b'{"choices": [7]}', b"\xff", b"[" * 100_000]
)
def test_replies_that_are_none(body: bytes) -> None:
    for api in ("chat", "completions"):
        with pytest.raises(BadReply):
            read_reply(body, api)


def test_backoff_doubles_and_is_seeded() -> None:
    waits = [backoff_s(1.0, 20.0, attempt, seed=5) for attempt in range(200)]
    for attempt, wait in enumerate(waits):
        whole = min(20.0, 2.0**attempt)
        assert whole / 2 <= wait <= whole
    assert waits == [backoff_s(1.0, 20.0, attempt, seed=5) for attempt in range(200)]
    assert waits[3] != backoff_s(1.0, 20.0, 3, seed=6)


def test_retry_after_header() -> None:
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    assert retry_after_s(None) is None
    assert retry_after_s("soon") is None
    assert retry_after_s(" 7 ") == 7.0
    assert retry_after_s("Thu, 01 Jan 2026 00:00:30 GMT", now) == 30.0
    assert retry_after_s("Wed, 31 Dec 2025 00:00:00 GMT", now) == 0.0


def test_requests_are_told_apart() -> None:
    one, other = (TeacherRequest.of(posed(1), sample, "plain", seed=0) for sample in (0, 1))
    assert one.seed != other.seed and 0 <= one.seed < 2**31
    keys = {one.key("a", "p"), one.key("b", "p"), one.key("a", "q"), other.key("a", "p")}
    assert len(keys) == 4
    assert json.dumps(one.key("a", "p")) == json.dumps(
        TeacherRequest.of(posed(1), 0, "plain", 0).key("a", "p")
    )
