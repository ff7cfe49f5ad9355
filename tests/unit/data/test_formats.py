"""Files, folders and splits: every format gives the same rows, and a split is honoured or refused."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, NamedSplit

from megatron_parallel_r1.data.readers import read_problems, stream_problems
from megatron_parallel_r1.data.schemas import Columns
from megatron_parallel_r1.errors import UserError

AIME = "math-ai/aime25"
GSM8K = "openai/gsm8k"
ROWS = [{"problem": f'p{i}, or "q"\n{i}', "answer": str(i)} for i in range(50)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def csv_text(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["problem", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def compressed(path: Path, content: bytes) -> None:
    with pa.output_stream(str(path), compression="detect") as file:
        file.write(content)


FORMATS: dict[str, Callable[[Path], object]] = {
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "rows.jsonl": lambda path: path.write_bytes(LINES),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "lines.json": lambda path: path.write_bytes(LINES),
    "rows.csv": lambda path: csv_text(path, ","),
    "rows.tsv": lambda path: csv_text(path, "\t"),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES[:900]) + gzip.compress(LINES[900:])),
    "rows.json.zst": lambda path: compressed(path, json.dumps(ROWS).encode()),
    "rows.jsonl.bz2": lambda path: compressed(path, LINES),
    "saved": lambda path: Dataset.from_list(ROWS).save_to_disk(path),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FORMATS[name](path)
    read = read_problems(AIME, path).items
    assert [(p.id, p.prompt, p.answers) for p in read] == [
        (str(i), row["problem"], (row["answer"],)) for i, row in enumerate(ROWS)
    ]
    streamed = stream_problems(AIME, path, buffer=7)
    assert tuple(streamed.in_order()) == read
    order = streamed.shuffled(seed=1)
    assert {order(place).prompt for place in range(50)} == {row["problem"] for row in ROWS}


def test_an_arrow_file(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert len(read_problems(AIME, file).items) == 50


def write(path: Path, prompt: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"question": [prompt], "answer": ["#### 1"]}), path)


def prompts(path: Path, **options: Any) -> list[str]:
    return [problem.prompt for problem in read_problems(GSM8K, path, **options).items]


@pytest.mark.parametrize("folder", [".", "data"])
def test_a_folder_with_splits_never_mixes_them(folder: str, tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write(tmp_path / folder / f"{name}.parquet", name)
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    both = ["train-00000-of-00002", "train-00001-of-00002"]
    assert prompts(tmp_path) == prompts(tmp_path, split="train") == both
    assert prompts(tmp_path, split="test") == ["test-00000-of-00001"]
    with pytest.raises(UserError, match="no split 'nonsense'; set split to test or train"):
        prompts(tmp_path, split="nonsense")
    assert read_problems(GSM8K, tmp_path).account.source == f"{tmp_path}, split train"


def test_a_test_set_alone_is_not_trained_on_by_accident(tmp_path: Path) -> None:
    write(tmp_path / "test-00000-of-00001.parquet", "t")
    with pytest.raises(UserError, match="no split 'train'; set split to test"):
        prompts(tmp_path)
    assert prompts(tmp_path, split="test") == ["t"]


def test_the_split_of_a_single_file(tmp_path: Path) -> None:
    write(tmp_path / "mine_test.parquet", "t")
    write(tmp_path / "mine.parquet", "m")
    assert prompts(tmp_path / "mine_test.parquet") == ["t"], "a file is named by its whole path"
    assert prompts(tmp_path / "mine.parquet", split="train") == ["m"]
    for name in ("x_test1", "aime_test2", "3test", "x-eval.2"):
        write(tmp_path / f"{name}.parquet", name)
        assert prompts(tmp_path / f"{name}.parquet", split="test") == [name]
        with pytest.raises(UserError, match="no split 'train'; set split to test"):
            prompts(tmp_path / f"{name}.parquet", split="train")
    with pytest.raises(UserError, match="no name there says a split"):
        prompts(tmp_path / "mine.parquet", split="test")
    with pytest.raises(UserError, match="no split 'nonsense'"):
        prompts(tmp_path / "mine.parquet", split="nonsense")
    write(tmp_path / "gsm8k_train.parquet", "x")
    with pytest.raises(UserError, match="no split 'test'; set split to train"):
        prompts(tmp_path / "gsm8k_train.parquet", split="test")


def test_only_a_clone_of_the_hub_has_configurations(tmp_path: Path) -> None:
    write(tmp_path / "mine.parquet", "m")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    for name in ("mine.parquet", "saved", "splits"):
        with pytest.raises(UserError, match=f"{name}: no config 'main'; .* leave config out"):
            prompts(tmp_path / name, config="main")


def test_a_clone_with_a_single_configuration_has_no_other(tmp_path: Path) -> None:
    write(tmp_path / "main/part.parquet", "m")
    card = '---\nconfigs:\n- config_name: only\n  data_files: [{split: train, path: "main/part*"}]\n---\n'
    (tmp_path / "README.md").write_text(card)
    assert prompts(tmp_path) == prompts(tmp_path, config="only") == ["m"]
    with pytest.raises(UserError, match="no config 'other'; set config to only"):
        prompts(tmp_path, config="other")


CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: "main/part*"}
  - {split: test, path: "main/held*"}
- config_name: socratic
  data_files: [{split: train, path: "socratic/*"}]
---
"""


@pytest.mark.parametrize("card", [True, False])
def test_a_clone_of_the_hub_with_configurations(card: bool, tmp_path: Path) -> None:
    part, held = ("part", "held") if card else ("train-0", "test-0")
    for name in (f"main/{part}", f"main/{held}", f"socratic/{part}"):
        write(tmp_path / f"{name}.parquet", name)
    if card:
        (tmp_path / "README.md").write_text(CARD)
    assert prompts(tmp_path) == [f"main/{part}"], "the schema knows its configuration"
    assert prompts(tmp_path, config="socratic") == [f"socratic/{part}"]
    assert prompts(tmp_path, split="test") == [f"main/{held}"]
    with pytest.raises(UserError, match="no config 'other'"):
        prompts(tmp_path, config="other")
    if card:
        with pytest.raises(UserError, match="no config None; set config to main or socratic"):
            read_problems("me/mine", tmp_path, columns=Columns(prompt="question", answer="answer"))


def test_what_save_to_disk_wrote_for_several_splits(tmp_path: Path) -> None:
    rows = {"train": [{"question": "a", "answer": "#### 1"}], "test": [{"question": "b", "answer": "#### 1"}]}
    DatasetDict({split: Dataset.from_list(part) for split, part in rows.items()}).save_to_disk(tmp_path)
    assert prompts(tmp_path) == ["a"]
    assert prompts(tmp_path, split="test") == ["b"]
    with pytest.raises(UserError, match="no split 'validation'; set split to test or train"):
        prompts(tmp_path, split="validation")


@pytest.mark.parametrize("recorded", ["test", "test[:10%]"])
def test_a_saved_test_split_is_not_trained_on_by_accident(recorded: str, tmp_path: Path) -> None:
    rows = [{"question": "t", "answer": "#### 1"}]
    Dataset.from_list(rows, split=NamedSplit(recorded)).save_to_disk(tmp_path)
    for split in (None, "train"):
        with pytest.raises(UserError, match="no split 'train'; set split to test"):
            prompts(tmp_path, split=split)
    assert prompts(tmp_path, split="test") == ["t"]


@pytest.mark.parametrize(
    ("cell", "type", "answer"),
    [
        (0.00001, pa.float64(), "0.00001"),
        (0.1, pa.float32(), "0.1"),
        (np.float16(0.1), pa.float16(), "0.1"),
        (1e-7, pa.float32(), "0.0000001"),
        (27.0, pa.float32(), "27"),
        (Decimal("12.50"), pa.decimal128(10, 2), "12.5"),
        (Decimal("27.00"), pa.decimal128(10, 2), "27"),
        (2**53 + 1, pa.int64(), "9007199254740993"),
        (2**64 - 1, pa.uint64(), "18446744073709551615"),
        (-0.0, pa.float64(), "0"),
        ({"truth": 0.1}, pa.struct({"truth": pa.float32()}), "0.1"),
        ([0.1, 0.2], pa.list_(pa.float32()), "0.1"),
    ],
)
def test_numbers_of_parquet_keep_their_decimal_form(
    cell: object, type: pa.DataType, answer: str, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"q": ["p"], "a": pa.array([cell], type)}), tmp_path / "rows.parquet")
    columns = Columns(prompt="q", answer="a.truth" if isinstance(cell, dict) else "a")
    assert read_problems("mine", tmp_path / "rows.parquet", columns=columns).items[0].answer == answer


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("0.00001", "0.00001"),
        ("1e-05", "0.00001"),
        ("0.1234567890123456789", "0.1234567890123456789"),
        ("1e23", "1" + "0" * 23),
        ("9007199254740993", "9007199254740993"),
        ("9007199254740993.0", "9007199254740993"),
        ("2.50", "2.5"),
    ],
)
def test_numbers_of_json_keep_their_decimal_form(written: str, answer: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"problem": "p", "answer": {written}}}\n')
    assert read_problems(AIME, path).items[0].answer == answer


@pytest.mark.parametrize("written", ["1e-400", "-0.5e-999999999", "1e400"])
def test_a_number_that_a_float_cannot_hold_costs_its_row(written: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"problem": "p", "answer": {written}}}\n{{"problem": "q", "answer": -0.0e-400}}\n')
    with pytest.raises(UserError, match=r"row 0 \(from 0\), column 'answer': a number "):
        read_problems(AIME, path)
    assert [problem.answer for problem in read_problems(AIME, path, bad_rows="skip").items] == ["0"]


def test_cells_of_csv_are_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('problem,answer\np,007\nq,1e-5\nr,NA\n\ns,"1,234"\n')
    assert [p.answer for p in read_problems(AIME, path).items] == ["007", "1e-5", "NA", "1,234"]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.csv", b"problem,answer\np,1,2\n", r"row 0 \(from 0\), more cells than columns, 3 instead of 2"),
        ("a.csv", b"problem,answer\np\n", r"row 0 \(from 0\), column 'answer': missing"),
        ("a.csv", b"problem,answer\np,1\nbro\xffken,1\n", r"row 1 \(from 0\), column 'problem': .*UTF-8"),
        ("a.csv", b"problem,problem\n", "two columns have one name"),
        ("a.csv", b'problem,answer\np,1\n"q" q,1\n', r"row 1 \(from 0\), not CSV, "),
        (
            "a.json",
            b'[{"problem": "p", "answer": 1}, {"problem": }]',
            r"row 1 \(from 0\), not JSON, Expecting",
        ),
        ("a.json", b'[{"problem": "p", "answer": 1}', r"row 1 \(from 0\), not JSON"),
        ("a.json", b'[{"problem": "p", "answer": 1}] x', "More after the end of the array"),
        ("a.json", b'[{"problem": "p", "answer": 1}, 7]', r"row 1 \(from 0\), a int, not an object"),
        ("a.json", b"[" * 100_000, "nested too deep"),
        ("a.json", b'{\n "data": [{"problem": "p"}]\n}\n', "one JSON object over several lines"),
        (
            "a.jsonl.gz",
            gzip.compress(LINES, mtime=0)[:-9],
            r"a\.jsonl\.gz: cannot be read \(.*\); copy it again",
        ),
        ("a.jsonl.zst", b"nonsense", r"a\.jsonl\.zst: cannot be read"),
        ("a.arrow", b"nonsense", r"a\.arrow: cannot be read by datasets"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("a.xlsx", b"PK", r"a\.xlsx: not one of \.parquet, \.jsonl"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",
)
def test_what_cannot_be_read_is_one_line(name: str, content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=what) as caught:
        read_problems(AIME, tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_damaged_folder_of_save_to_disk_is_one_line(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path)
    for file in tmp_path.glob("*.arrow"):
        file.unlink()
    with pytest.raises(UserError, match="cannot be read by datasets") as caught:
        read_problems(AIME, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_cell_that_python_cannot_hold_costs_its_row(tmp_path: Path) -> None:
    rows = {"problem": ["p", "q"], "answer": ["1", "2"], "day": pa.array([0, 2**53], pa.timestamp("ms"))}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"row 1 \(from 0\), column 'day': cannot be read, "):
        read_problems(AIME, tmp_path / "rows.parquet")
    assert len(read_problems(AIME, tmp_path / "rows.parquet", bad_rows="skip").items) == 1
