"""A tokenizer is tried when it is loaded; BOS, EOS and control tokens are treated as its folder says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from megatron_parallel_r1.data.embedded.generate import build_tokenizer
from megatron_parallel_r1.data.prompts import chat_template_for, decode, encode_prompt
from megatron_parallel_r1.data.tokenizers import open_thinking_tokenizer, open_tokenizer, train_tokenizer
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.serve.engine_request import text_prompts
from megatron_parallel_r1.thought.tokenizer import add_tags, eos_ids

USER = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["Tom has 3 apples and buys 4 more."] * 3, vocab_size=280)


def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that begins texts with BOS, as Llama's does."""
    made = byte_tokenizer()
    bos = ("<bos>", made.bos_token_id)
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return made


def change(folder: Path, **fields: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "LlamaTokenizer", "GPT2Tokenizer"])
def test_a_tokenizer_whose_file_is_missing(kind: str, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    change(tmp_path, tokenizer_class=kind)
    with pytest.raises(UserError, match=f"{tmp_path.name}: the tokenizer "):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]", '{"model": {"type": "Odd"}}'])
def test_a_damaged_file(content: str, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="the tokenizer cannot be loaded") as refused:
        open_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)


def test_code_of_its_own_is_not_run(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    change(tmp_path, tokenizer_class="OddTokenizer", auto_map={"AutoTokenizer": ["odd.OddTokenizer", None]})
    (tmp_path / "odd.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match="needs Python code of its own"):
        open_tokenizer(tmp_path)


def test_a_text_that_does_not_come_back(tmp_path: Path) -> None:
    from tokenizers import normalizers

    made = byte_tokenizer()
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    made.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the tokenizer changes a text: 'Step 1"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('never') }}", r"fails on a user's message \(never\)"),
        ("{% for m in messages %}{{ m.content }", "fails on a user's message"),
        ("{{ messages[0].content.nothing.at_all }}", "fails on a user's message"),
        ("", "does not show the user's message"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not show the user's message"),
        ([{"name": "tools", "template": USER}], "fails on a user's message"),
    ],
)
def test_chat_templates_that_do_not_work(template: Any, message: str, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    change(tmp_path, chat_template=template)
    with pytest.raises(UserError, match=f"the chat template {message}"):
        open_tokenizer(tmp_path)


def test_a_template_that_fails_on_one_problem_names_it() -> None:
    found = byte_tokenizer()
    found.chat_template = (
        "{% if 'odd' in messages[0].content %}{{ 1 // 0 }}{% endif %}{{ messages[0].content }}"
    )
    assert encode_prompt(found, "plain", "1 + 1") == found.encode("1 + 1")
    with pytest.raises(UserError, match=r"fails on a problem \(integer division .*: 'an odd one'"):
        encode_prompt(found, "plain", "an odd one")


def test_a_list_of_templates_with_a_default_works(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    templates = [{"name": "default", "template": USER}, {"name": "tools", "template": "odd"}]
    change(tmp_path, chat_template=templates)
    found = open_tokenizer(tmp_path)
    assert decode(found, encode_prompt(found, "plain", "1 + 1")) == "user: 1 + 1\n"


def test_a_vocabulary_of_few_words_works(tmp_path: Path) -> None:
    made = build_tokenizer()
    tags = add_tags(made)
    made.save_pretrained(tmp_path)
    assert open_thinking_tokenizer(tmp_path)[1] == tags


def test_bos_is_added_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    plain, bos = byte_tokenizer(), with_bos()
    text = plain.encode("1 + 1\n")
    first = bos.bos_token_id
    assert encode_prompt(plain, "plain", "1 + 1") == text
    assert encode_prompt(bos, "plain", "1 + 1") == [first, *text]
    assert encode_prompt(bos, "plain", "<bos>1 + 1") == [first, *text]
    assert text_prompts(bos, 300, ["1 + 1\n", "1"]) == [[first, *text], [first, *plain.encode("1")]]
    # The template of a release has it, and it is not doubled.
    assert chat_template_for(plain) in chat_template_for(bos)
    bos.chat_template = chat_template_for(bos)
    assert encode_prompt(bos, "plain", "1 + 1") == [first, *text]
    bos.chat_template = USER
    assert first not in encode_prompt(bos, "plain", "1 + 1")


def test_all_eos_tokens_of_a_folder_end_a_response(tmp_path: Path) -> None:
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<turn>", "<other>"]})
    add_tags(made)
    made.save_pretrained(tmp_path)
    turn, other = made.convert_tokens_to_ids(["<turn>", "<other>"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": other}))
    assert eos_ids(tmp_path) == [other]
    settings = {"eos_token_id": [turn, made.eos_token_id]}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    found, tags = open_thinking_tokenizer(tmp_path)
    assert tags.ends == {turn, made.eos_token_id} and tags.eos == made.eos_token_id
    # None of them is text.
    words = found.encode("3 apples")
    assert decode(found, [*words, turn]) == decode(found, [*words, tags.eos]) == "3 apples"
