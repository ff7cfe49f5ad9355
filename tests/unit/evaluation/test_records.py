"""Keys that tell what decides a response, and a folder of records that survives a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.records import RecordFolder, sample_requests
from tests.unit.evaluation.made import record

PROBLEMS = [Problem(str(i), f"{i} + 1 = ?", (str(i + 1),), "made") for i in range(3)]
SETUP = ["weights", {"mode": "isolated", "paths": 2}, "native"]


def keys(
    problems: list[Problem] = PROBLEMS, samples: int = 2, seed: int = 0, setup: list = SETUP
) -> list[str]:
    return [attempt.key for attempt in sample_requests("made", problems, samples, seed, setup)]


def test_a_key_changes_with_all_that_decides_a_response_and_nothing_else() -> None:
    ours = keys()
    assert len(set(ours)) == 6
    others = [
        keys(seed=1),
        keys(setup=["other weights", *SETUP[1:]]),
        keys(setup=[SETUP[0], {"mode": "isolated", "paths": 3}, SETUP[2]]),
        keys(setup=[*SETUP[:2], "sglang"]),
        keys([replace(problem, prompt=problem.prompt + " ") for problem in PROBLEMS]),
        keys([replace(problem, answers=("9",)) for problem in PROBLEMS]),
    ]
    for theirs in others:
        assert not set(ours) & set(theirs)
    assert keys([replace(problem, id="x", source="elsewhere") for problem in PROBLEMS]) == ours
    assert keys(setup=[SETUP[0], {"paths": 2, "mode": "isolated"}, SETUP[2]]) == ours


def test_a_key_changes_with_what_the_prompt_shows_beside_the_problem() -> None:
    plain = PROBLEMS[0]
    assert keys([plain], 1) == ["f7b27f5b573b0f59"], "records of older versions must be found again"
    hinted = [replace(plain, context=(("system", text),)) for text in ("Be brief.", "Be exact.")]
    levels = [replace(plain, columns={"level": level}) for level in (1, 2)]
    template = "Level {level}: {problem}"
    requests = [
        *sample_requests("made", [plain, *hinted], 1, 0, SETUP),
        *sample_requests("made", levels, 1, 0, SETUP, template),
    ]
    assert len({request.key for request in requests}) == 5
    assert len({request.identity for request in requests}) == 3
    assert keys([levels[0]]) == keys([plain]), "columns that the prompt does not show decide nothing"


def test_more_samples_and_other_problems_leave_what_is_there() -> None:
    more = sample_requests("made", PROBLEMS[1:], 5, 0, SETUP)
    before = {attempt.key: attempt.seed for attempt in sample_requests("made", PROBLEMS, 2, 0, SETUP)}
    assert {a.key: a.seed for a in more if a.sample < 2} == dict(list(before.items())[2:])
    assert len({attempt.seed for attempt in more}) == 10


def test_two_checkpoints_meet_the_same_draws() -> None:
    ours, theirs = (sample_requests("made", PROBLEMS, 2, 0, [weights]) for weights in ("a", "b"))
    assert [a.seed for a in ours] == [a.seed for a in theirs]
    assert all(0 <= a.seed < 1 << 63 for a in ours)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path, SETUP)
    assert folder.read() == {}
    written = [record(str(i), blocks=i, answer=None if i else "½\n\x00") for i in range(3)]
    for copy, part in ((0, written[:2]), (1, written[2:])):
        with folder.writer(copy) as write:
            for item in part:
                write(item)
    assert RecordFolder(tmp_path, SETUP).read() == {item.key: item for item in written}
    assert RecordFolder(tmp_path, ["other"]).read() == {}


def test_a_torn_last_line_is_dropped_and_written_anew(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path, SETUP)
    with folder.writer(0) as write:
        write(record("0"))
        write(record("1"))
    file = folder.folder / "copy0.jsonl"
    whole = file.read_bytes()
    for cut in (1, 40, len(whole.splitlines(keepends=True)[1]) - 1):
        file.write_bytes(whole[:-cut])
        assert [item.problem for item in folder.read().values()] == ["0"]
        with folder.writer(0) as write:
            write(record("1"))
        assert file.read_bytes() == whole


def test_what_is_no_record_is_named(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path, SETUP)
    with folder.writer(0) as write:
        write(record("0"))
    file = folder.folder / "copy0.jsonl"
    file.write_text(file.read_text() + '{"key": "1"}\n')
    with pytest.raises(UserError, match=r"copy0.jsonl, record 2: not a record"):
        folder.read()
    file.write_text("not json\n")
    with pytest.raises(UserError, match="line 1: not JSON"):
        folder.read()
