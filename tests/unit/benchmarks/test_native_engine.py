"""The benchmark of the native engine runs, tiny, and what it flattens draws the same tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import native_engine
from benchmarks.embedded_work import EmbeddedWork, flattened
from benchmarks.paced import Pace


def test_its_table_is_full_but_for_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    native_engine.main(["--traces", "2", "--paths", "2", "--repeats", "1", "--without-vllm"])
    row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2]
    cells = row.strip("| ").split(" | ")
    assert cells[:2] == ["2", "2"] and [cell for cell in cells if cell == "–"] == ["–"] * 3
    assert all(float(cell.split()[0]) > 0 for cell in cells if cell != "–")


def test_flattened_sequences_draw_what_the_trace_did() -> None:
    work = EmbeddedWork()
    pace = Pace(main=4, path=6, summary=4)
    (trace,) = work.traces(work.engine(), pace, 3, work.prompts(1), varied=True)
    flat = flattened(trace)
    assert flat.drawn == sum(trace.sampled)
    whole = [*trace.prompt, *trace.tokens]
    tags = work.tags
    assert flat.main[0] == list(trace.prompt) and whole[sum(map(len, flat.main[:1])) + flat.main[1] - 1] == (
        tags.parallel
    )
    assert len(flat.paths) == 3 and all(tokens[-1] == tags.path for tokens, _ in flat.paths)
    assert flat.rest[0][-2:] == [tags.parallel_end, tags.summary]
    assert len(flat.rest[0]) + flat.rest[1] == len(whole)


def test_a_server_that_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_engine, "VLLM", Path(sys.executable))
    monkeypatch.setattr(native_engine.vllm_sequences, "__file__", "absent.py")
    with pytest.raises(RuntimeError, match="ended with exit code 2"), native_engine.vllm(EmbeddedWork()):
        pass
