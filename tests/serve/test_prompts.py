"""A conversation becomes what the training's prompts were."""

from __future__ import annotations

import pytest

from megatron_parallel_r1.data.prompts import TEMPLATES, encode_prompt
from megatron_parallel_r1.serve.engine_request import chat_prompt
from megatron_parallel_r1.serve.schema import ApiError, Message
from tests.serve.release import tokenizer

CHAT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "w11 {{ m.role }} {{ m.content }} w12 {% endfor %}{% if add_generation_prompt %}w13{% endif %}"
)


def message(role: str, content: str) -> Message:
    return Message(role=role, content=content)


@pytest.mark.parametrize("chat_template", [None, CHAT])
@pytest.mark.parametrize("name", TEMPLATES)
def test_one_message_is_put_as_in_training(name: str, chat_template: str | None) -> None:
    model = tokenizer()
    model.chat_template = chat_template
    problem = "w8 {problem} w9"
    prompt = chat_prompt(model, TEMPLATES[name], [message("user", problem)])
    assert prompt == encode_prompt(model, name, problem)


def test_earlier_turns_stay_as_they_are() -> None:
    model = tokenizer()
    model.chat_template = CHAT
    turns = [message("user", "w20"), message("assistant", "w21"), message("user", "w22")]
    words = model.decode(chat_prompt(model, "w9 {problem}", turns)).split()
    assert [word for word in words if word not in ("w7", "w11", "w12", "w13")] == ["w20", "w21", "w9", "w22"]
    with pytest.raises(ApiError, match="no system") as refused:
        chat_prompt(model, "{problem}", [message("system", "w8"), *turns])
    assert refused.value.status == 400
