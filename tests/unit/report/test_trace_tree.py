"""`parallel-r1 traces`: the chosen traces, and what the terminal shows of them."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from megatron_parallel_r1.cli import app
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.report.run_folder import read_run
from megatron_parallel_r1.report.trace_tree import chosen_traces, trace_tree
from tests.unit.report.synthetic import HOSTILE, write_run


def path(text: str, **more: object) -> dict[str, object]:
    return {"text": text, "closed": True, "forced": False, "answer": None, "correct": None, **more}


def test_a_tree_shows_paths_with_their_answers() -> None:
    inner = {"kind": "block", "paths": [path("deep")], "summary": None, "well_formed": False, "stray": "x"}
    block = {
        "kind": "block",
        "paths": [
            path("2 + 2 is 4", answer="4", correct=True),
            path("", parts=[{"kind": "text", "text": "first"}, inner], forced=True),
            path("[bold]5[/bold]", answer="5", correct=False, closed=False),
        ],
        "summary": "4 twice",
        "well_formed": True,
        "stray": None,
    }
    record = {
        "step": 3,
        "problem": "2 + 2?",
        "answer": "4",
        "extracted": "4",
        "correct": True,
        "reward": 1.0,
        "finish": "length",
        "text_parts": [{"kind": "text", "text": "Let me see."}, block, {"kind": "text", "text": "It is 4."}],
    }
    console = Console(width=100, record=True, file=StringIO())
    console.print(trace_tree("rl", record))
    assert console.export_text().splitlines() == [
        "rl, step 3: right, reward 1, truncated",
        "├── problem  2 + 2?",
        "├── Let me see.",
        "├── 3 paths",
        "│   ├── path 1: 4, right",
        "│   │   └── 2 + 2 is 4",
        "│   ├── path 2, closed by the engine",
        "│   │   ├── first",
        "│   │   └── 1 path, not well-formed",
        "│   │       ├── path 1",
        "│   │       │   └── deep",
        "│   │       └── outside the paths  x",
        "│   ├── path 3: 5, wrong, cut off",
        "│   │   └── [bold]5[/bold]",
        "│   └── summary  4 twice",
        "├── It is 4.",
        "└── answer  4, right is 4",
    ]


def test_traces_are_chosen_by_stage_step_kind_and_length(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (stage,) = (each for each in read_run(run).stages if each.name == "rl_hard")
    recorded = [("rl_hard", record) for record in stage.traces]
    assert chosen_traces(run, "rl_hard", None, "all", False, 3) == recorded[-3:]
    step = recorded[0][1]["step"]
    assert chosen_traces(run, "rl_hard", step, "all", False, 999) == [
        pair for pair in recorded if pair[1]["step"] == step
    ]
    right, wrong = (chosen_traces(run, "rl_hard", None, kind, False, 999) for kind in ("right", "wrong"))
    assert all(record["correct"] is True for _, record in right)
    assert all(record["correct"] is False for _, record in wrong)
    longest = chosen_traces(run, None, None, "all", True, 1)[0][1]
    parts = [record["text_parts"] for each in read_run(run).stages for record in each.traces]
    assert len(json.dumps(longest["text_parts"])) == max(len(json.dumps(each)) for each in parts)
    with pytest.raises(UserError, match="no stage rl; it has"):
        chosen_traces(run, "rl", None, "all", False, 1)
    with pytest.raises(UserError, match="no recorded trace matches"):
        chosen_traces(run, None, 10**6, "all", False, 1)


def test_the_command_shows_a_hostile_trace_as_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    done = CliRunner().invoke(app, ["traces", str(run), "--count", "999"])
    assert done.exit_code == 0, done.output
    assert HOSTILE[:30] in done.output
