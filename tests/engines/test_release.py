"""A release loads in SGLang and in vLLM, under the prompt that it was trained with."""

from __future__ import annotations

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engines.servers import Shared

pytestmark = [pytest.mark.engines, pytest.mark.slow]


@pytest.mark.xdist_group("sglang")
def test_in_sglang_its_greedy_answer_is_that_of_transformers(sglang_server: Shared) -> None:
    assert_answers_as_transformers(sglang_server)


@pytest.mark.xdist_group("vllm")
def test_in_vllm_its_greedy_answer_is_that_of_transformers(vllm_server: Shared) -> None:
    assert_answers_as_transformers(vllm_server)


def assert_answers_as_transformers(server: Shared) -> None:
    model = AutoModelForCausalLM.from_pretrained(server.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(server.folder)
    messages = [{"role": "user", "content": "w9 w12 w20"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :].tolist()
    names = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"]
    body = {"model": names[0]["id"], "max_tokens": 8, "temperature": 0, "messages": messages}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300).raise_for_status()
    answer = response.json()["choices"][0]["message"]["content"]
    assert tokenizer.encode(answer or "", add_special_tokens=False) == [
        token for token in expected if token not in tokenizer.all_special_ids
    ]
