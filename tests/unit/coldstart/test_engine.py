"""Our own engine as the teacher, on a random tiny model that likes to open blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_parallel_r1.coldstart.run import cold_start
from megatron_parallel_r1.coldstart.settings import ColdStart
from megatron_parallel_r1.coldstart.teacher import TeacherRequest
from megatron_parallel_r1.data.prompts import decode, encode_prompt
from megatron_parallel_r1.data.tokenizers import train_tokenizer
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.tokenizer import add_tags
from megatron_parallel_r1.utils.jsonl import read_jsonl
from tests.unit.coldstart.written_traces import gsm8k_file, posed
from tests.unit.rollout.tiny import native_engine, tiny_qwen3

# Above other tokens, in nats: of some 270, so that most traces have blocks and many end.
EAGER = {"parallel": 4.0, "path_end": 4.5, "summary_end": 4.5, "eos": 3.5}
THINKING = {"paths": 2, "max_blocks": 2, "max_path_tokens": 6, "max_response_tokens": 60}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = train_tokenizer([posed(1).prompt], vocab_size=262)
    tags = add_tags(tokenizer)
    tokenizer.save_pretrained(folder)
    model = tiny_qwen3(vocabulary=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[:, 0] = 0.0
        for name, nats in EAGER.items():
            model.lm_head.weight[getattr(tags, name), 0] = nats / 4.15
    model.save_pretrained(folder)
    yield folder


def test_it_writes_what_the_rollout_loop_writes(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tree = {
        "out": str(tmp_path / "out"),
        "data": {"name": "openai/gsm8k", "path": str(gsm8k_file(tmp_path, 4))},
        "teacher": {"kind": "engine", "path": str(folder), "thinking": THINKING},
        "samples": 2,
        "rounds": 1,
        "concurrency": 3,
        "seed": 7,
    }
    with pytest.raises(UserError, match="no answer passes"):  # a random model solves nothing
        cold_start(ColdStart.read(tree, "test"))
    records = read_jsonl(tmp_path / "out" / "answers.jsonl")
    assert len(records) == 4 * 2 * 2
    texts = {(record["problem"], record["sample"]): (record["text"], record["finish"]) for record in records}

    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = native_engine(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    thinker = Thinker(engine, Tags.of(tokenizer), Thinking(**THINKING))
    requests = [
        TeacherRequest.of(posed(number), sample, "parallel", 7) for number in range(4) for sample in range(4)
    ]
    prompts = [encode_prompt(tokenizer, "parallel", request.problem.prompt) for request in requests]
    traces = asyncio.run(roll_out(thinker, prompts, [request.seed for request in requests]))
    for request, trace in zip(requests, traces, strict=True):
        finish = "stop" if trace.finish == "eos" else "length"
        assert texts[request.problem.id, request.sample] == (decode(tokenizer, trace.tokens), finish)
    assert any(trace.tree.blocks for trace in traces)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "cut by length" in report or "no answer" in report


def test_folders_that_are_no_teacher(folder: Path, tmp_path: Path) -> None:
    tree = {
        "out": str(tmp_path / "out"),
        "data": {"name": "openai/gsm8k", "path": str(gsm8k_file(tmp_path, 1))},
        "teacher": {"kind": "engine", "path": str(tmp_path / "nowhere")},
    }
    with pytest.raises(UserError, match="nowhere"):
        cold_start(ColdStart.read(tree, "test"))
    (folder / "thinking.json").write_text('{"prompt": "plain", "prompt_template": "{problem}"}')
    tree["teacher"] = {"kind": "engine", "path": str(folder)}
    with pytest.raises(UserError, match="trained with the prompt 'plain'; set template to that"):
        cold_start(ColdStart.read(tree, "test"))
    (folder / "thinking.json").unlink()
    for file in folder.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    train_tokenizer([posed(1).prompt], vocab_size=262).save_pretrained(tmp_path)
    tree["teacher"] = {"kind": "engine", "path": str(tmp_path)}
    with pytest.raises(UserError, match=r"no token for <Parallel>.*trained to think in parallel"):
        cold_start(ColdStart.read(tree, "test"))
