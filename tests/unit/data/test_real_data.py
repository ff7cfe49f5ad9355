"""Readers on copies of the published files; counts are those of the copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_parallel_r1.data.readers import read_examples, read_problems
from megatron_parallel_r1.data.tokenizers import train_tokenizer
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tokenizer import add_tags

PARALLEL = "Parallel-R1/Parallel-GSM8K"
MATH = "DigitalLearningGmbH/MATH-lighteval"


@pytest.mark.parametrize(
    ("name", "file", "kept", "answer"),
    [
        ("openai/gsm8k", "gsm8k_train", 7473, "72"),
        ("HuggingFaceH4/MATH-500", "math300", 316, "9"),
        ("HuggingFaceH4/aime_2024", "aime24", 30, "540"),
        ("math-ai/aime25", "aime25", 30, "70"),
        ("math-ai/amc23", "amc23", 40, "27"),
        (PARALLEL, "parallel_gsm8k", 281, "19"),
    ],
)
def test_every_row_is_read(name: str, file: str, kept: int, answer: str, real_data: Path) -> None:
    reading = read_problems(name, real_data / f"{file}.parquet")
    assert len(reading.items) == reading.rows == kept
    assert reading.items[0].answer == answer


def test_dapo_repeats(real_data: Path) -> None:
    path = real_data / "dapo_math_17k.parquet"
    reading = read_problems("BytedTsinghua-SIA/DAPO-Math-17k", path)
    assert reading.rows == 17917
    assert len(reading.items) == len({problem.prompt for problem in reading.items})
    assert (len(reading.items), reading.repeated, reading.disputed) == (17148, 726, 43)


def test_math_has_two_empty_boxes(real_data: Path) -> None:
    path = real_data / "math_train.parquet"
    with pytest.raises(UserError, match=r"row 5341 \(from 0\), column 'solution': no \\boxed value"):
        read_problems(MATH, path)
    reading = read_problems(MATH, path, bad_rows="skip")
    assert (len(reading.items), reading.rows) == (7498, 7500)
    assert [bad.row for bad in reading.bad] == [5341, 5343]


def test_parallel_gsm8k_has_two_malformed_responses(real_data: Path) -> None:
    path = real_data / "parallel_gsm8k.parquet"
    with pytest.raises(UserError, match=r"row 88 \(from 0\), column 'response': text between the paths"):
        read_examples(PARALLEL, path)
    reading = read_examples(PARALLEL, path, bad_rows="skip")
    assert len(reading.items) == 279
    assert [bad.row for bad in reading.bad] == [88, 125]
    tokenizer = train_tokenizer([example.response for example in reading.items], vocab_size=2000)
    tags = add_tags(tokenizer)
    blocks = 0
    for example in reading.items:
        ids = tokenizer.encode(example.response)
        assert tokenizer.decode(ids) == example.response
        blocks += len(parse(ids, tags, strict=True).blocks)
    assert blocks == 355
