"""Messages by role, lists of right answers, worked answers, prompt templates, repeats and contradictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_parallel_r1.data.account import account_table
from megatron_parallel_r1.data.embedded.generate import build_tokenizer
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import (
    encode_prompt,
    messages_of,
    render,
    template_columns,
    template_text,
)
from megatron_parallel_r1.data.readers import read_examples, read_problems, stream_problems
from megatron_parallel_r1.data.schemas import Columns
from megatron_parallel_r1.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "How many?"}


def read(folder: Path, *rows: dict[str, Any], columns: Columns, **options: Any) -> tuple[Problem, ...]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_problems("custom", path, columns=columns, **options).items


def test_the_last_turn_of_the_user_is_the_problem_and_what_is_before_is_kept(tmp_path: Path) -> None:
    dialogue = [
        SYSTEM,
        USER,
        {"role": "assistant", "content": "Of what?"},
        {"role": "user", "content": "Cats."},
    ]
    items = read(
        tmp_path,
        {"prompt": [USER], "a": 1},
        {"prompt": [SYSTEM, USER], "a": 2},
        {"prompt": dialogue, "a": 3},
        {"prompt": [{"from": "human", "value": "Share?"}, {"from": "gpt", "value": "no"}], "a": 4},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Parts?"}]}], "a": 5},
        {"prompt": "Text?", "a": 6},
        columns=Columns(prompt="prompt", answer="a"),
    )
    assert [problem.prompt for problem in items] == ["How many?"] * 2 + ["Cats.", "Share?", "Parts?", "Text?"]
    assert [len(problem.context) for problem in items] == [0, 1, 3, 0, 0, 0]
    assert messages_of("{problem}!", items[1]) == [SYSTEM, {"role": "user", "content": "How many?!"}]
    tokenizer = build_tokenizer()
    assert encode_prompt(tokenizer, "plain", items[1]) == tokenizer.encode("Be brief.\nHow many?\n")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert encode_prompt(tokenizer, "plain", items[1]) == tokenizer.encode(
        "system: Be brief.\nuser: How many?\n"
    )


def test_a_role_chooses_its_last_message(tmp_path: Path) -> None:
    row = {"prompt": [SYSTEM, USER, {"role": "assistant", "content": "7 cats"}], "a": 1}
    for path, expected in {
        "prompt.user": "How many?",
        "prompt.system": "Be brief.",
        "prompt.0.content": "Be brief.",
    }.items():
        (problem,) = read(tmp_path, row, columns=Columns(prompt=path, answer="a"))
        assert (problem.prompt, problem.context) == (expected, ())
    columns = Columns(prompt="prompt", answer="a", response="prompt")
    (example,) = read_examples("custom", tmp_path / "rows.jsonl", columns=columns).items
    assert (example.problem.prompt, example.response) == ("How many?", "7 cats")


@pytest.mark.parametrize("where", [("prompt", "prompt"), ("prompt.user", "prompt.assistant")])
def test_a_response_replies_to_the_last_message_of_the_user(where: tuple[str, str], tmp_path: Path) -> None:
    replies = [{"role": "assistant", "content": text} for text in ("first", "second")]
    columns = Columns(prompt=where[0], answer="a", response=where[1])
    dialogues = [[USER, replies[0], USER], [USER, replies[0], USER, replies[1]]]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": d, "a": 1}) for d in dialogues))
    data = read_examples("custom", tmp_path / "rows.jsonl", columns=columns, bad_rows="skip")
    assert [example.response for example in data.items] == ["second"]
    assert str(data.bad[0]).endswith(f"column {where[1]!r}: no reply to the user's last message")


def test_only_messages_that_are_used_need_a_content(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": ["f()"]}
    dialogues = [[{"role": "system", "content": blank}, USER, call] for blank in ("", " ", None, [])]
    rows = [{"prompt": dialogue, "a": 1} for dialogue in dialogues]
    items = read(tmp_path, *rows, columns=Columns(prompt="prompt", answer="a"))
    assert [(problem.prompt, problem.context) for problem in items] == [("How many?", ())] * 4


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ([{"role": ["user"], "content": "x"}], "column 'prompt': a role that is a list"),
        ([{"role": {"user": 1}, "content": "x"}], "column 'prompt': a role that is a dict"),
        ([{"role": "assistant", "content": None}, USER], "column 'prompt': missing"),
        ([SYSTEM], "column 'prompt': no message of the user"),
        ([], "column 'prompt': not a list of messages"),
        (["text"], "column 'prompt': not a list of messages"),
        ([{"role": "user", "content": None}], "column 'prompt': missing"),
        ([{"role": "user", "content": [{"type": "image"}]}], "column 'prompt': list instead of text"),
    ],
)
def test_a_conversation_that_cannot_be_read(prompt: object, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"row 0 \(from 0\), {what}"):
        read(tmp_path, {"prompt": prompt, "a": 1}, columns=Columns(prompt="prompt", answer="a"))


def test_dapo_rows_with_a_system_prompt(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": [SYSTEM, USER], "reward_model": {"ground_truth": "1"}}))
    (problem,) = read_problems("BytedTsinghua-SIA/DAPO-Math-17k", path).items
    assert (problem.prompt, problem.context) == ("How many?", (("system", "Be brief."),))


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        (["1/2", 0.5, "1/2"], ("1/2", "0.5")),
        ('["1/2", "0.5"]', ("1/2", "0.5")),
        ("[1, 2]", ("[1, 2]",)),
        ("So 617 * 2.\n#### 1,234", ("1234",)),
        ("So both.\n#### 3, 5", ("3, 5",)),
        (r"First \boxed{1}, so it is $\boxed{\frac{1}{2}}$.", (r"\frac{1}{2}",)),
        ("#### Sum\nIt is 7", ("#### Sum\nIt is 7",)),
        ("So it is\n####\n1,234,567", ("1234567",)),
        ('["0.1234567890123456789", 0.1234567890123456789, 1e-7]', ("0.1234567890123456789", "0.0000001")),
        ([0.00001], ("0.00001",)),
    ],
)
def test_right_answers(cell: object, answers: tuple[str, ...], tmp_path: Path) -> None:
    (problem,) = read(tmp_path, {"q": "q", "a": cell}, columns=Columns(prompt="q", answer="a"))
    assert problem.answers == answers


@pytest.mark.parametrize(
    ("cell", "what"),
    [
        ([], "an empty list"),
        (["1", None], "missing"),
        ([["1"]], "list instead of text"),
        ("worked\n####", "no value after ####"),
        ('["' + '", ["' * 100_000, "nested too deep"),
        (r"So it is \boxed{12", r"a \\boxed{ that is never closed"),
        (r"First \boxed{1}, then $\boxed{\frac{1}{2}$.", r"a \\boxed{ that is never closed"),
        ({"x": 1}, "dict instead of text"),
    ],
)
def test_answers_that_cannot_be_read(cell: object, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"row 0 \(from 0\), column 'a': {what}"):
        read(tmp_path, {"q": "q", "a": cell}, columns=Columns(prompt="q", answer="a"))


def test_a_template_of_ones_own_shows_columns() -> None:
    problem = Problem("0", "1 + 1 = {x}?", ("2",), "mine", columns={"level": 3.0, "extra": {"kind": "sum"}})
    text = r"Level {level}, {extra.kind}. {problem} Close with \boxed{} or {{answer}}."
    assert render(text, problem) == r"Level 3, sum. 1 + 1 = {x}? Close with \boxed{} or {answer}."
    assert template_columns(text) == ("level", "extra.kind")
    assert template_columns("parallel") == ()
    with pytest.raises(UserError, match="problem 0 of mine, column 'year': missing"):
        render("{year} {problem}", problem)
    for wrong in ("Solve it.", "Solve {Problem}", "Solve {{problem}}", ""):
        with pytest.raises(UserError, match=r"is no template: use plain, .* or a text with \{problem\}"):
            template_text(wrong)


def test_a_row_without_a_column_of_the_template_is_a_bad_row(tmp_path: Path) -> None:
    rows = [{"q": "p", "a": 1, "level": 2}, {"q": "r", "a": 1, "level": None}]
    columns = Columns(prompt="q", answer="a")
    with pytest.raises(UserError, match=r"row 1 \(from 0\), column 'level': missing"):
        read(tmp_path, *rows, columns=columns, fields=("level",))
    assert len(read(tmp_path, *rows, columns=columns, fields=("level",), bad_rows="skip")) == 1
    with pytest.raises(UserError, match=r"\{a\} would show the right answer of custom"):
        read(tmp_path, *rows, columns=columns, fields=("a",))


def test_each_row_may_name_its_source(tmp_path: Path) -> None:
    rows = [{"q": "p", "a": 1, "from": "aime"}, {"q": "r", "a": 1, "from": "amc"}]
    items = read(tmp_path, *rows, columns=Columns(prompt="q", answer="a", source="from"))
    assert [problem.source for problem in items] == ["aime", "amc"]


def test_repeats_and_contradictions_are_counted_and_kept_in_a_set_of_ones_own(tmp_path: Path) -> None:
    rows = [{"q": q, "a": a} for q, a in [("x", 1), ("y", 1), ("x", 1), ("y", 2), ("z", 5), ("x ", 1)]]
    path, columns = tmp_path / "rows.jsonl", Columns(prompt="q", answer="a")
    assert len(read(tmp_path, *rows, columns=columns)) == 6
    account = read_problems("custom", path, columns=columns).account
    assert (account.kept, account.repeated, account.disputed) == (6, 2, 2)
    kept = "kept; drop_repeats=true leaves them out"
    assert account.notes() == [
        f"{path}: 2 of 6 rows repeat an earlier problem, {kept}",
        f"{path}: 2 of 6 rows contradict another row about the right answer of a problem, "
        f"such as rows 1 and 3, {kept}",
    ]
    assert account_table([account]).splitlines()[2] == f"| {path} | 6 | 6 | 0 |  |  |"
    dropped = read_problems("custom", path, columns=columns, drop_repeats=True)
    assert [problem.prompt for problem in dropped.items] == ["x", "z"]
    assert dropped.account.notes()[0].endswith("repeat an earlier problem, left out")
    streamed = stream_problems("custom", path, columns=columns, drop_repeats=True)
    assert tuple(streamed.in_order()) == dropped.items
    with pytest.raises(UserError, match="no usable row; all contradict one another"):
        read(tmp_path, rows[1], rows[3], columns=columns, drop_repeats=True)


def test_the_same_question_after_another_system_prompt_is_no_repeat(tmp_path: Path) -> None:
    rows = [{"prompt": [SYSTEM, USER], "a": 1}, {"prompt": [USER], "a": 2}]
    read(tmp_path, *rows, columns=Columns(prompt="prompt", answer="a"))
    account = read_problems(
        "custom", tmp_path / "rows.jsonl", columns=Columns(prompt="prompt", answer="a")
    ).account
    assert account.notes() == []
