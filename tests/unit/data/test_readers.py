"""Readers on small files of the published schemas, good rows and bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from megatron_parallel_r1.data.account import BadRow, account_table
from megatron_parallel_r1.data.readers import read_examples, read_problems, stream_problems
from megatron_parallel_r1.data.schemas import Columns
from megatron_parallel_r1.errors import UserError

WRAPPED = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
GSM8K = "openai/gsm8k"
MATH = "DigitalLearningGmbH/MATH-lighteval"
DAPO = "BytedTsinghua-SIA/DAPO-Math-17k"


def jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dapo(text: str, answer: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], "reward_model": {"ground_truth": answer}}


def test_gsm8k(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": " How many? ", "answer": "9 <<9*120=1080>>\n#### 1,080"})
    problem = read_problems(GSM8K, path).items[0]
    assert (problem.id, problem.prompt, problem.answers, problem.source) == (
        "0",
        "How many?",
        ("1080",),
        GSM8K,
    )


def test_math_takes_the_last_box(tmp_path: Path) -> None:
    solution = r"First $\boxed{1}$, then $\boxed{\frac{1}{\sqrt{2}}}$."
    path = jsonl(tmp_path, {"problem": "p", "solution": solution})
    assert read_problems(MATH, path).items[0].answers == (r"\frac{1}{\sqrt{2}}",)


def test_dapo_unwraps_and_drops_repeats(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path,
        dapo(WRAPPED.format("Find $x$."), "34"),
        dapo("Find $y$.", "1"),
        dapo("Find $x$.", "34"),
        dapo("Find $y$.", "2"),
        dapo("Find $z$.", "5"),
        dapo("Find  $z$.\n", "5"),
        dapo(WRAPPED.format("Find $w$.").partition("\n\nRemember")[0], "6"),
    )
    reading = read_problems(DAPO, path)
    assert [(problem.prompt, problem.answer) for problem in reading.items] == [
        ("Find $x$.", "34"),
        ("Find $z$.", "5"),
        ("Find $w$.", "6"),
    ]
    assert (reading.rows, reading.repeated, reading.disputed) == (7, 2, 2)


def test_parallel_examples_are_canonical(tmp_path: Path) -> None:
    response = "<Parallel>\n<Path>a</Path>\n<Path>b</Path></Parallel>\n<Summary>c</Summary>\nFinal Answer: 3"
    path = jsonl(tmp_path, {"question": "q", "response": response, "answer": "3"})
    example = read_examples("Parallel-R1/Parallel-GSM8K", path).items[0]
    assert "</Parallel><Summary>" in example.response and "<Parallel><Path>a</Path><Path>" in example.response
    assert example.problem.answers == ("3",)


@pytest.mark.parametrize(
    ("answer", "read"),
    [(27, "27"), (27.0, "27"), (0.5, "0.5"), (10**400, "1" + "0" * 400), ("\\pi", "\\pi")],
)
def test_answers_kept_as_numbers(answer: object, read: str, tmp_path: Path) -> None:
    for name, column in (("math-ai/amc23", "question"), ("math-ai/amc23", "problem")):
        path = jsonl(tmp_path, {column: "p", "answer": answer})
        assert read_problems(name, path).items[0].answers == (read,)


@pytest.mark.parametrize(
    ("name", "row", "what"),
    [
        (GSM8K, {"question": "q", "answer": "no mark"}, "column 'answer': no value after ####"),
        (GSM8K, {"question": "q", "answer": "#### "}, "column 'answer': no value after ####"),
        (GSM8K, {"question": "  ", "answer": "#### 1"}, "column 'question': blank"),
        (GSM8K, {"question": None, "answer": "#### 1"}, "column 'question': missing"),
        (GSM8K, {"question": 7, "answer": "#### 1"}, "column 'question': int instead of text"),
        (GSM8K, {"problem": "q", "answer": "#### 1"}, "column 'question': missing"),
        (MATH, {"problem": "p", "solution": r"so \boxed{}"}, r"column 'solution': no \boxed value"),
        (MATH, {"problem": "p", "solution": r"\boxed{1}, \boxed{2"}, r"column 'solution': a \boxed{ that is"),
        (DAPO, {"prompt": "p", "reward_model": {"ground_truth": "1"}}, "column 'prompt': not a list"),
        (DAPO, {"prompt": [], "reward_model": {"ground_truth": "1"}}, "column 'prompt': not a list"),
        (DAPO, dapo(" ", "1"), "column 'prompt': blank"),
        (DAPO, {"prompt": [{"role": "user", "content": "p"}]}, "column 'reward_model': missing"),
        (DAPO, dapo("p", ""), "column 'ground_truth': blank"),
        ("math-ai/aime25", {"problem": "p", "answer": True}, "column 'answer': bool instead of text"),
    ],
)
def test_a_bad_row_is_refused_by_file_row_and_column(
    name: str, row: dict[str, Any], what: str, tmp_path: Path
) -> None:
    path = jsonl(tmp_path, row)
    with pytest.raises(UserError) as caught:
        read_problems(name, path)
    assert f"{path}: row 0 (from 0), {what}" in str(caught.value)
    with pytest.raises(UserError, match="no usable row"):
        read_problems(name, path, bad_rows="skip")


def test_bad_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    good = {"question": "q", "answer": "#### 1"}
    path = jsonl(tmp_path, good, {"question": "q", "answer": "1"}, good)
    reading = read_problems(GSM8K, path, bad_rows="skip")
    assert [problem.id for problem in reading.items] == ["0", "2"]
    assert reading.rows == 3
    assert reading.bad == (BadRow(1, "column 'answer': no value after ####"),)
    assert len(read_problems(GSM8K, path, limit=1).items) == 1


def test_the_table_says_what_was_dropped_and_why(tmp_path: Path) -> None:
    rows = [
        dapo("p", "1"),
        dapo("p", "1"),
        dapo("q", "1"),
        dapo("q", "2"),
        *[dapo("r", "")] * 10,
        dapo("", "|"),
    ]
    account = read_problems(DAPO, jsonl(tmp_path, *rows), bad_rows="skip").account
    assert account.kept == 1
    assert account_table([account]).splitlines()[2:] == [
        f"| {account.source} | 15 | 1 | 10 | column 'ground_truth': blank | 4, 5, 6, 7, 8, 9, 10, 11, … |",
        "|  |  |  | 1 | column 'prompt': blank | 14 |",
        "|  |  |  | 1 | repeats an earlier problem |  |",
        "|  |  |  | 2 | copies of the problem disagree on the answer |  |",
    ]
    clean = read_problems(DAPO, jsonl(tmp_path, rows[0])).account
    assert account_table([clean]).splitlines()[2] == f"| {clean.source} | 1 | 1 | 0 |  |  |"


def test_broken_utf8_is_a_bad_row(tmp_path: Path) -> None:
    bytes_ = pa.array([b"fine", b"bro\xffken", b"fine too"], pa.binary())
    broken = pa.StringArray.from_buffers(3, bytes_.buffers()[1], bytes_.buffers()[2])
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"problem": broken, "answer": ["1", "2", "3"]}), path)
    with pytest.raises(UserError, match=r"row 1 \(from 0\), .*not UTF-8"):
        read_problems("math-ai/aime25", path)
    reading = read_problems("math-ai/aime25", path, bad_rows="skip")
    assert [problem.prompt for problem in reading.items] == ["fine", "fine too"]
    assert len(reading.bad) == 1


def test_broken_lines_are_bad_rows(tmp_path: Path) -> None:
    good = b'{"problem": "p", "answer": 1}\n'
    lines = [
        b"\xef\xbb\xbf" + good,
        b'{"problem": "bro\xffken", "answer": 1}\n',
        b"\n",
        b'{"problem": "p", "ans\n',
        b'["p", 1]\n',
        b'{"problem": {"text": "p"}, "answer": 1}\n',
        b'{"problem": "p", "answer": NaN}\r\n',
        b"[" * 100_000 + b"\n",
        b'{"problem": "p", "answer": ' + b"9" * 5000 + b"}\n",
        b'{"problem": "p \\ud800", "answer": 1}\n',
        good.strip(),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(lines))
    reading = read_problems("math-ai/aime25", path, bad_rows="skip")
    assert [problem.id for problem in reading.items] == ["0", "10"]
    assert reading.rows == 10
    assert [(bad.row, bad.what) for bad in reading.bad] == [
        (1, "text that is not UTF-8"),
        (3, "not JSON"),
        (4, "a list, not an object with columns"),
        (5, "column 'problem': dict instead of text"),
        (6, "column 'answer': a number that is not finite"),
        (7, "not JSON"),
        (8, "not JSON"),
        (9, "column 'problem': a lone surrogate"),
    ]
    with pytest.raises(UserError, match=r"row 1 \(from 0\), text that is not UTF-8, at byte 16 of the line"):
        read_problems("math-ai/aime25", path)


def test_own_columns_plain_and_nested(tmp_path: Path) -> None:
    block = "<Parallel><Path>a</Path>\n<Path>b</Path></Parallel><Summary>c</Summary>"
    row = {"chat": [{"content": "q"}], "graded": {"truth": 7.0}, "a.b": block}
    path = jsonl(tmp_path, row, {**row, "graded": {}}, {**row, "a.b": "<Path>"})
    columns = Columns(prompt="chat.0.content", answer="graded.truth", response="a.b")
    reading = read_examples("custom", path, columns=columns, bad_rows="skip")
    (example,) = reading.items
    assert (example.problem.prompt, example.problem.answers, example.problem.source) == (
        "q",
        ("7",),
        "custom",
    )
    assert example.response == block.replace("\n", "")
    assert [bad.what.split(":")[0] for bad in reading.bad] == ["column 'graded.truth'", "column 'a.b'"]
    assert len(read_problems("mine", path, columns=columns, bad_rows="skip").items) == 2
    with pytest.raises(UserError, match=r"column 'question': missing; the row has 'chat', 'graded', 'a\.b'"):
        read_problems("custom", path, columns=Columns(prompt="question", answer="answer"))
    with pytest.raises(UserError, match="no worked responses"):
        read_examples("custom", path, columns=Columns(prompt="chat.0.content", answer="graded.truth"))
    with pytest.raises(UserError, match="name the columns"):
        read_problems("custom", path)
    with pytest.raises(UserError, match="give its path"):
        read_problems("custom", columns=columns)


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"problem": ["c", " "], "answer": [3, 4]}), tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_text('{"problem": "a", "answer": 1}\n')
    (tmp_path / "README.md").write_text("not data")
    reading = read_problems("math-ai/aime25", tmp_path, bad_rows="skip")
    assert [problem.id for problem in reading.items] == ["a.jsonl:0", "b.parquet:0"]
    assert reading.bad == (BadRow(1, "column 'problem': blank", file="b.parquet"),)
    with pytest.raises(UserError, match=r"row 1 \(from 0\) of b\.parquet, column 'problem': blank"):
        read_problems("math-ai/aime25", tmp_path)


def test_a_table_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def load(*args: object, split: str) -> Dataset:
        calls.append((*args, split))
        return Dataset.from_dict({"question": [f"q{i}" for i in range(2500)], "answer": ["#### 5"] * 2500})

    monkeypatch.setattr("datasets.load_dataset", load)
    reading = read_problems(GSM8K, split="test")
    assert [problem.prompt for problem in reading.items] == [f"q{i}" for i in range(2500)]
    assert reading.account.source == GSM8K
    assert calls == [(GSM8K, "main", "test")]
    columns = Columns(prompt="question", answer="answer")
    streamed = stream_problems("me/mine", columns=columns)
    assert calls[1] == ("me/mine", None, "train")
    assert [problem.id for problem in streamed.in_order()] == [str(i) for i in range(2500)]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such data file"):
        read_problems(GSM8K, tmp_path / "absent.parquet")
    (tmp_path / "rows.txt").write_text("a,b\n")
    with pytest.raises(UserError, match=r"rows\.txt: not one of \.parquet"):
        read_problems(GSM8K, tmp_path / "rows.txt")
    for content in ("{ nothing of the kind", ""):
        (tmp_path / "rows.parquet").write_text(content)
        with pytest.raises(
            UserError, match=r"rows\.parquet: cannot be read as \.parquet \(.*\); copy it again"
        ):
            read_problems(GSM8K, tmp_path / "rows.parquet")
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"rows\.jsonl: (row 0 \(from 0\), not JSON|no usable row)"):
            read_problems(GSM8K, tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"folder: holds no \.parquet"):
        (tmp_path / "folder").mkdir()
        read_problems(GSM8K, tmp_path / "folder")


def test_a_parquet_file_cut_short_or_damaged_inside(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"problem": [f"problem {i} {i * i}" for i in range(500)], "answer": ["1"] * 500})
    pq.write_table(table, path, compression="zstd")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as"):
        read_problems("math-ai/aime25", path)
    path.write_bytes(whole[:100] + bytes(200) + whole[300:])
    with pytest.raises(UserError, match="cannot be read as"):
        read_problems("math-ai/aime25", path)


def test_unknown_data_set_and_missing_responses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'openai/gsm9k': unknown, use one of"):
        read_problems("openai/gsm9k")
    with pytest.raises(UserError, match="no worked responses"):
        read_examples(GSM8K, tmp_path / "rows.jsonl")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nat all")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match=r"openai/gsm8k, split test: cannot load .*\(no route\)"):
        read_problems(GSM8K, split="test")
