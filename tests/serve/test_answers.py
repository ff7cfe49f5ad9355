"""What a client gets: OpenAI's shapes, streamed or not, and the paths beside the text."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from megatron_parallel_r1.data.embedded.generate import build_tokenizer
from megatron_parallel_r1.serve.response_assembler import ResponseAssembler
from megatron_parallel_r1.thought.tokenizer import add_tags
from tests.serve.release import THINKING, tokenizer
from tests.serve.server import PROMPT, chat, events, wait_until_idle

HARNESS = Path(__file__).parents[2] / "eval/harness"
TOKENIZER = tokenizer()
SEED = 2  # of a response with several blocks and an end


def respond(client: httpx.Client, body: dict[str, Any], kind: str = "chat/completions") -> dict[str, Any]:
    response = client.post(f"/v1/{kind}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def text_of(chain: dict[str, Any]) -> list[str]:
    """The words of a response in flat order, put together from its `parallel` field."""
    words = chain["texts"][0].split()
    for block, after in zip(chain["blocks"], chain["texts"][1:], strict=True):
        words.append("<Parallel>")
        for path in block["paths"]:
            words += ["<Path>", *text_of(path), "</Path>"]
        if block["summary"] is not None:
            words += ["</Parallel>", "<Summary>", *block["summary"]["text"].split()]
            words += ["</Summary>"] if block["summary"]["closed"] else []
        words += after.split()
    return words


def test_a_chat_completion_has_openais_shape_and_the_paths(client: httpx.Client) -> None:
    body = respond(client, chat(model="tiny", seed=SEED))
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    (choice,) = body["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason", "parallel"}
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "stop"
    assert len(choice["parallel"]["blocks"]) > 1
    assert all(len(block["paths"]) == THINKING.paths for block in choice["parallel"]["blocks"])
    assert text_of(choice["parallel"]) == choice["message"]["content"].split()
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(TOKENIZER.encode(f"w9 {PROMPT}\n"))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    critical = usage["completion_tokens_details"]["critical_path_tokens"]
    assert 0 < critical < usage["completion_tokens"]


@pytest.mark.parametrize("n", [1, 3])
def test_a_streamed_chat_is_the_same(client: httpx.Client, n: int) -> None:
    whole = respond(client, chat(seed=SEED, n=n))
    body = chat(seed=SEED, n=n, stream=True, stream_options={"include_usage": True})
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = list(events(response))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    for index, expected in enumerate(whole["choices"]):
        own_choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert own_choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert [c["finish_reason"] for c in own_choices] == [None] * (len(own_choices) - 1) + [
            expected["finish_reason"]
        ]
        content = "".join(c["delta"].get("content", "") for c in own_choices)
        assert content == expected["message"]["content"]
        assert text_of_branches(own_choices) == flattened(expected["parallel"])
    assert len({choice["message"]["content"] for choice in whole["choices"]}) == n


def text_of_branches(choices: list[dict[str, Any]]) -> dict[tuple[int, ...], str]:
    voices: dict[tuple[int, ...], str] = {}
    for choice in choices:
        for delta in choice.get("parallel", {}).get("deltas", []):
            at = tuple(delta["at"])
            assert delta["part"] == ("main" if not at else "summary" if len(at) % 2 else "path")
            voices[at] = voices.get(at, "") + delta["text"]
    return voices


def flattened(chain: dict[str, Any], at: tuple[int, ...] = ()) -> dict[tuple[int, ...], str]:
    voices = {at: "".join(chain["texts"])}
    for number, block in enumerate(chain["blocks"], start=1):
        for index, path in enumerate(block["paths"]):
            voices |= flattened(path, (*at, number, index))
        if block["summary"] is not None:
            voices[(*at, number)] = block["summary"]["text"]
    return voices


def test_a_text_completion_takes_the_prompt_as_it_is(client: httpx.Client) -> None:
    """The same tokens as the chat's template makes give the same text; prompts may be several, or ids."""
    expected = respond(client, chat(seed=SEED))["choices"][0]["message"]["content"]
    request = {"prompt": f"w9 {PROMPT}", "seed": SEED}
    body = respond(client, request, "completions")
    assert body["object"] == "text_completion" and body["choices"][0]["text"] == expected
    tokens = TOKENIZER.encode(f"w9 {PROMPT}")
    assert respond(client, request | {"prompt": tokens}, "completions")["choices"][0]["text"] == expected
    several = respond(client, request | {"prompt": [f"w9 {PROMPT}", "w11"], "n": 2}, "completions")
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert several["choices"][0]["text"] == expected
    assert several["usage"]["prompt_tokens"] == len(tokens) + 1
    with client.stream("POST", "/v1/completions", json=request | {"stream": True}) as response:
        chunks = list(events(response))
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == expected


def test_what_a_request_may_change(client: httpx.Client) -> None:
    def parallel(**fields: Any) -> dict[str, Any]:
        return respond(client, chat(seed=SEED, **fields))["choices"][0]["parallel"]

    assert len(parallel(parallel={"paths": 5})["blocks"][0]["paths"]) == 5
    assert len(parallel(parallel={"max_blocks": 1})["blocks"]) == 1
    assert parallel(parallel={"mode": "sequential"})["blocks"] == []
    cut = respond(client, chat(seed=SEED, max_tokens=7))
    assert cut["usage"]["completion_tokens"] == 7 and cut["choices"][0]["finish_reason"] == "length"
    greedy = [respond(client, chat(temperature=0, max_tokens=30))["choices"][0]["message"] for _ in range(2)]
    assert greedy[0] == greedy[1]
    unlike = [respond(client, chat())["choices"][0]["message"]["content"] for _ in range(4)]
    assert len(set(unlike)) > 1, "without a seed each request has its own"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_the_length_that_the_harness_sends_is_as_good_as_none(client: httpx.Client, field: str) -> None:
    task = yaml.load((HARNESS / "_base.yaml").read_text(), yaml.BaseLoader)
    length = int(task["generation_kwargs"]["max_gen_toks"])
    assert length > THINKING.max_response_tokens
    request = chat(seed=SEED, **{field: length})
    assert respond(client, request)["choices"] == respond(client, chat(seed=SEED))["choices"]


def test_a_stop_sequence_ends_the_main_text(client: httpx.Client) -> None:
    whole = respond(client, chat(seed=SEED))["choices"][0]
    last = whole["parallel"]["texts"][-2].split()[0]
    for stop in (f"</Summary> {last}", last):
        body = chat(seed=SEED, stop=[stop, "never"])
        stopped = respond(client, body)["choices"][0]
        content = stopped["message"]["content"]
        assert whole["message"]["content"].startswith(content) and stopped["finish_reason"] == "stop"
        assert (stop in "".join(whole["parallel"]["texts"])) == (content != whole["message"]["content"])
        assert stop not in "".join(stopped["parallel"]["texts"])
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            streamed = [choice for chunk in events(response) for choice in chunk["choices"]]
        assert "".join(choice["delta"].get("content", "") for choice in streamed) == content
    assert wait_until_idle(client)["cache_tokens"] == 0


def test_many_at_once_are_each_as_if_alone(client: httpx.Client) -> None:
    """No path of one request is visible to another: a text depends on its own prompt and seed alone."""
    bodies = [chat(f"w{8 + i % 20} w{10 + i % 7}", seed=i, n=1 + i % 2, max_tokens=300) for i in range(24)]
    alone = [respond(client, body)["choices"] for body in bodies]
    assert sum(bool(choice["parallel"]["blocks"]) for choices in alone for choice in choices) > 10
    busy: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            busy.append(client.get("/health").json()["running"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: respond(client, body)["choices"], bodies))
    ended.set()
    watcher.join()
    assert together == alone
    assert max(busy) > 4, "they were not served together"
    assert wait_until_idle(client) == {"status": "ok", "running": 0, "waiting": 0, "cache_tokens": 0}


def test_the_delta_that_closes_a_path_has_its_answer() -> None:
    embedded = build_tokenizer()
    tags = add_tags(embedded)
    (found,) = embedded.encode("found=3")
    response = ResponseAssembler(embedded, tags)
    response.add((), tags.parallel)
    for path, words in enumerate(([found], [])):
        for token in (*tags.path_begin(path + 1), *words, tags.path_end):
            response.add((1, path), token)
    closed = [delta["answer"] for delta in response.take_delta().branches if delta.get("closed")]
    assert closed == ["3", None]
    (block,) = response.parallel()["blocks"]
    assert [path["answer"] for path in block["paths"]] == ["3", None]
