"""`logprobs`, `top_logprobs` and `echo`, compared with what transformers computes of the same folder."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.serve.release import tokenizer
from tests.serve.server import chat, events, wait_until_idle

TOKENIZER = tokenizer()
PROMPT = "w8 w9 w10 w23"
# The engine rounds the same float64 logits once to float32.
BOUND = 1e-5


def respond(client: httpx.Client, body: dict[str, Any], kind: str = "completions") -> dict[str, Any]:
    response = client.post(f"/v1/{kind}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture(scope="module")
def peer(release: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(release, dtype=torch.float64)


def reference(peer: Any, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs [T, V] of the token behind each."""
    with torch.no_grad():
        return (peer(torch.tensor([tokens])).logits[0] / temperature).log_softmax(-1)


def without_block(logprobs: torch.Tensor) -> torch.Tensor:
    """Where no block fits, its tag is taken out of the distribution."""
    logprobs = logprobs.clone()
    logprobs[..., TOKENIZER.convert_tokens_to_ids("<Parallel>")] = float("-inf")
    return logprobs.log_softmax(-1)


def test_an_echoed_prompt_has_the_log_probs_of_transformers(client: httpx.Client, peer: Any) -> None:
    """As lm-eval asks: several lists of ids, echo, one token."""
    prompts = [TOKENIZER.encode(PROMPT), TOKENIZER.encode("w30 w12"), [9]]
    body = {"prompt": prompts, "logprobs": 3, "echo": True, "max_tokens": 1, "temperature": 0}
    choices = respond(client, body)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    for tokens, choice in zip(prompts, choices, strict=True):
        found, expected = choice["logprobs"], reference(peer, tokens)
        expected[-1] = without_block(expected[-1])
        drawn = int(expected[-1].argmax())
        words = TOKENIZER.convert_ids_to_tokens([*tokens, drawn])
        assert found["tokens"] == words and choice["text"] == " ".join(words)
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        for place, (token, row) in enumerate(zip([*tokens[1:], drawn], expected, strict=True), start=1):
            assert found["token_logprobs"][place] == pytest.approx(float(row[token]), abs=BOUND)
            best = row.topk(3)
            wanted = dict(
                zip(TOKENIZER.convert_ids_to_tokens(best.indices), best.values.tolist(), strict=True)
            )
            wanted[words[place]] = float(row[token])
            assert found["top_logprobs"][place] == pytest.approx(wanted, abs=BOUND)
        greedy = [max(top.values()) for top in found["top_logprobs"][1:]]
        assert greedy[-1] == found["token_logprobs"][-1], "the same number, or no harness finds it greedy"
        for begin, word in zip(found["text_offset"], words, strict=True):
            assert choice["text"][begin:].lstrip().startswith(word)


def test_a_prompt_is_scored_without_drawing(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "logprobs": 0, "echo": True, "max_tokens": 0}
    scored = respond(client, body)
    (choice,) = scored["choices"]
    assert choice["text"] == PROMPT and scored["usage"]["completion_tokens"] == 0
    longer = respond(client, body | {"max_tokens": 2, "temperature": 0})["choices"][0]["logprobs"]
    assert longer["token_logprobs"][:4] == choice["logprobs"]["token_logprobs"]
    assert list(choice["logprobs"]["top_logprobs"][1]) == ["w9"]
    plain = respond(client, {"prompt": PROMPT, "echo": True, "max_tokens": 2, "temperature": 0})["choices"][0]
    assert plain["logprobs"] is None and plain["text"].startswith(f"{PROMPT} ")


def test_drawn_tokens_have_the_log_probs_of_their_distribution(client: httpx.Client, peer: Any) -> None:
    """At the request's temperature and without the suppressed tag; forced tokens are certain."""
    fields = {"logprobs": True, "top_logprobs": 2, "seed": 3, "max_tokens": 12, "temperature": 0.7}
    body = chat(PROMPT, **fields, parallel={"mode": "sequential"})
    (choice,) = respond(client, body, "chat/completions")["choices"]
    content = choice["logprobs"]["content"]
    drawn = TOKENIZER.convert_tokens_to_ids([entry["token"] for entry in content])
    prompt = TOKENIZER.encode(f"w9 {PROMPT}\n")
    expected = reference(peer, [*prompt, *drawn], 0.7)[len(prompt) - 1 : -1]
    expected = without_block(expected)
    for entry, token, row in zip(content, drawn, expected, strict=True):
        assert entry["logprob"] == pytest.approx(float(row[token]), abs=BOUND)
        assert bytes(entry["bytes"]).decode() == entry["token"]
        top = [alternative["logprob"] for alternative in entry["top_logprobs"]]
        assert top == pytest.approx(row.topk(2).values.tolist(), abs=BOUND)


@pytest.mark.parametrize("kind", ["completions", "chat/completions"])
def test_a_stream_has_the_same_log_probs(client: httpx.Client, kind: str) -> None:
    """With paths: in the order of the flat text, forced tags with log-prob 0."""
    plain: dict[str, Any] = {"prompt": f"w9 {PROMPT}", "logprobs": 2, "echo": True}
    body = plain if kind == "completions" else chat(PROMPT, logprobs=True, top_logprobs=2)
    body |= {"seed": 2, "n": 2}
    whole = respond(client, body, kind)["choices"]
    with client.stream("POST", f"/v1/{kind}", json=body | {"stream": True}) as response:
        chunks = [choice for chunk in events(response) for choice in chunk["choices"]]
    for index, choice in enumerate(whole):
        pieces = [chunk["logprobs"] for chunk in chunks if chunk["index"] == index and chunk["logprobs"]]
        assert len(pieces) > 3
        for field in (
            ("tokens", "token_logprobs", "top_logprobs", "text_offset") if "prompt" in body else ("content",)
        ):
            assert [item for piece in pieces for item in piece[field]] == choice["logprobs"][field]
        if "prompt" in body:
            words, logprobs = choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]
            assert choice["text"].split() == [word for word in words if word != "<eos>"]
            assert "".join(c["text"] for c in chunks if c["index"] == index) == choice["text"]
            forced = {"<Path>", "<Summary>"}
            assert forced <= set(words)
            after = pairwise(zip(words, logprobs, strict=True))
            assert all(
                value == 0
                for (before, _), (word, value) in after
                if (before, word) == ("</Parallel>", "<Summary>")
            )
    assert wait_until_idle(client)["cache_tokens"] == 0


def test_long_prompts_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from megatron_parallel_r1.rollout.native import engine as module
    from tests.unit.rollout.tiny import VOCABULARY, native_engine, tiny_qwen3

    tokens = [8 + i * 7 % 20 for i in range(50)]

    async def scores() -> Any:
        engine = native_engine(tiny_qwen3())
        context = engine.open()
        busy = engine.open()
        other = asyncio.ensure_future(engine.write(busy, tokens[:5]))
        found = await engine.score(context, tokens, 2)
        await other
        return found

    whole = asyncio.run(scores())
    monkeypatch.setattr(module, "SCORED_LOGITS", 3 * VOCABULARY)
    parts = asyncio.run(scores())
    assert len(whole) == len(parts) == 49
    for one_pass, several in zip(whole, parts, strict=True):
        assert one_pass.logprob == pytest.approx(several.logprob, abs=1e-5)
        assert [token for token, _ in one_pass.alternatives] == [token for token, _ in several.alternatives]


def test_unknown_words_are_named(client: httpx.Client) -> None:
    body = chat("w8 Solve Solve w9 x=7", max_tokens=2)
    (warning,) = respond(client, body, "chat/completions")["warnings"]
    assert "'Solve', 'x=7'" in warning and "w7" in warning
    with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        assert [chunk["warnings"] for chunk in events(response) if "warnings" in chunk] == [[warning]]
    text = {"prompt": ["w8", "hello"], "max_tokens": 1}
    assert "'hello'" in respond(client, text)["warnings"][0]
    with client.stream("POST", "/v1/completions", json=text | {"stream": True}) as response:
        assert "'hello'" in next(events(response))["warnings"][0]
    assert "warnings" not in respond(client, {"prompt": "w8 w7", "max_tokens": 1})


def test_the_fields_of_other_engines(client: httpx.Client) -> None:
    neutral = {
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "top_k": -1,
        "reasoning_effort": "high",
        "store": True,
    }
    neutral |= {"stop_token_ids": [], "skip_special_tokens": True, "user": "me", "chat_template_kwargs": {}}
    plain = chat("w8", seed=5, max_tokens=9)
    expected = respond(client, plain, "chat/completions")["choices"]
    assert respond(client, plain | neutral, "chat/completions")["choices"] == expected
    for field, value in {
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "bad_words": ["a"],
    }.items():
        refused = client.post("/v1/chat/completions", json=plain | {field: value})
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["param"], error["code"]) == (field, "unsupported_parameter") and field in error[
            "message"
        ]
    for body in ({"logprobs": 21}, {"logprobs": True}, {"max_tokens": 0}, {"top_logprobs": 2}, {"echo": 1}):
        refused = client.post("/v1/completions", json={"prompt": "w8"} | body)
        assert refused.status_code == 400 and refused.json()["error"]["param"].split(".")[0] in body, body
    for body in (
        {"logprobs": 2},
        {"top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 21},
        {"echo": True},
    ):
        refused = client.post("/v1/chat/completions", json=chat("w8") | body)
        assert refused.status_code == 400 and refused.json()["error"]["param"].split(".")[0] in body, body
    json.dumps(expected)
