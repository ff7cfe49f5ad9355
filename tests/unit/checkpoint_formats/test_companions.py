"""What belongs to a model beside its weights stays with it."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.checkpoint_formats.hf_folder import save_hf_folder
from megatron_parallel_r1.conversion.command import release_command
from megatron_parallel_r1.conversion.shard_plan import Target
from megatron_parallel_r1.conversion.to_hf import megatron_to_hf
from megatron_parallel_r1.conversion.to_megatron import hf_to_megatron
from tests.serve.release import THINKING, tokenizer
from tests.unit.conversion.folders import write_hf

SETTINGS = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "bos_token_id": 11, "eos_token_id": [9, 6]}
FILES = ("LICENSE", "USE_POLICY.md", "qwen.tiktoken", "additional_chat_templates/rag.jinja")


def write_base(folder: Path) -> None:
    write_hf(folder, "llama", bos_token_id=12)
    tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(SETTINGS))
    (folder / "additional_chat_templates").mkdir()
    for name in FILES:
        (folder / name).write_text(f"{name} of the base")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)


def test_conversions_keep_all_of_it(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    hf_to_megatron(tmp_path / "base", tmp_path / "megatron", Target())
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    for name in (*FILES, "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "base" / name).read_bytes(), name


def test_a_run_and_its_release_keep_it(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = ModelConfig.from_hf(model.config.to_dict())
    words = AutoTokenizer.from_pretrained(tmp_path / "base")
    trained = tmp_path / "trained"
    save_hf_folder(trained, config, model.state_dict().items(), words, base=tmp_path / "base")
    (tmp_path / "thinking.json").write_text(
        json.dumps(THINKING.model_dump() | {"prompt_template": "{problem}"})
    )
    words_ = (trained, tmp_path / "release", "--thinking", tmp_path / "thinking.json")
    assert release_command([str(word) for word in words_]) == 0
    for folder in (trained, tmp_path / "release"):
        kept = GenerationConfig.from_pretrained(folder).to_dict()
        assert {key: kept[key] for key in SETTINGS} == SETTINGS
        stored = json.loads((folder / "config.json").read_text())
        assert (stored["bos_token_id"], stored["eos_token_id"]) == (11, [9, 6])
        for name in FILES:
            assert (folder / name).read_text() == f"{name} of the base", (folder, name)


def test_the_eos_of_the_tokenizer_is_among_them(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 9}')
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = ModelConfig.from_hf(model.config.to_dict())
    save_hf_folder(tmp_path / "out", config, model.state_dict().items(), tokenizer(), base=tmp_path / "base")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [9, 6]
    # config.json of the base has a BOS, though its generation settings have none.
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 12
