"""A release loads in SGLang and in vLLM, under the prompt that it was trained with."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_parallel_r1.conversion.pieces import Target
from megatron_parallel_r1.conversion.release import Given, write_release
from megatron_parallel_r1.conversion.to_megatron import hf_to_megatron
from tests.engines.folders import write_folder
from tests.engines.servers import sglang, vllm
from tests.serve.release import THINKING

pytestmark = [pytest.mark.engines, pytest.mark.slow]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a checkpoint that went through Megatron's form, in several files."""
    folder = tmp_path_factory.mktemp("release")
    hf_to_megatron(write_folder(folder / "hf"), folder / "megatron", Target(2, 2))
    thinking = folder / "thinking.json"
    thinking.write_text(json.dumps(asdict(THINKING) | {"prompt_template": "w9 {problem}"}))
    write_release(Given(folder / "megatron", thinking=thinking), folder / "out", shard_bytes=30_000)
    assert len(list((folder / "out").glob("*.safetensors"))) > 1
    return folder / "out"


@pytest.mark.parametrize("served", [sglang, vllm])
def test_its_greedy_answer_is_that_of_transformers(
    served: Callable[[Path], AbstractContextManager[str]], release: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(release, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(release)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "w9 w12 w20"}], tokenize=False)
    prompt = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :].tolist()
    with served(release) as url:
        names = httpx.get(f"{url}/v1/models", timeout=60).json()["data"]
        asked = {"model": names[0]["id"], "max_tokens": 8, "temperature": 0}
        said = httpx.post(
            f"{url}/v1/chat/completions",
            json=asked | {"messages": [{"role": "user", "content": "w9 w12 w20"}]},
            timeout=300,
        ).raise_for_status()
    answer = said.json()["choices"][0]["message"]["content"]
    assert tokenizer.encode(answer or "", add_special_tokens=False) == [
        token for token in expected if token != tokenizer.eos_token_id
    ]
