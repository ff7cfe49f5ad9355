"""What a user can get wrong ends in one line that names it, exit code 2, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_parallel_r1 import cli

RECIPE = str(Path(__file__).parent / "mini.yaml")


def fail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["parallel-r1", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    shown = capsys.readouterr().err.strip()
    assert len(shown.splitlines()) == 1 and shown.startswith("error: ")
    return shown


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seeed=1", "seeed: unknown key"),
        ("stages.rl.stepz=1", "stages.1.stepz: unknown key"),
        ("stages.rl.steps=many", "stages.1.steps: Input should be a valid integer"),
        ("stages.rl.steps=0", "stages.1.steps: Input should be greater than or equal to 1"),
        ("stages.nope.steps=1", "no nope in the list, it has cold_start, rl"),
        ("stages.rl.thinking.pathz=2", "stage rl: thinking.pathz: unknown key"),
        ("stages.rl.thinking.paths=9", "stage rl: thinking: paths must be 1..8"),
        ("stages.rl.start=rl", "stage rl starts from rl, which is no stage before it"),
        ("stages.rl.reward.name=fame", "reward 'fame': unknown"),
        ("thinking.mode=psychic", "thinking.mode: Input should be"),
        ("model.path=/somewhere", "give either shape"),
        ("evaluation=null", "wants an evaluation"),
        ("steps", "write key=value"),
        ("name.first=x", "name holds a single value"),
    ],
)
def test_recipe(capsys, monkeypatch, tmp_path: Path, override: str, named: str) -> None:
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, f"out={tmp_path}", override)
    assert named in shown, shown
    assert not list(tmp_path.iterdir())


def test_missing_and_malformed_files(capsys, monkeypatch, tmp_path: Path) -> None:
    assert "No such file" in fail(capsys, monkeypatch, "curriculum", str(tmp_path / "none.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("stages: [")
    assert "no valid YAML" in fail(capsys, monkeypatch, "sft", str(broken))
    broken.write_text("just text")
    assert "a recipe is a mapping" in fail(capsys, monkeypatch, "rl", str(broken))
    assert "no such run folder" in fail(capsys, monkeypatch, "report", str(tmp_path / "none"))
    absent = str(tmp_path / "absent")
    shown = fail(capsys, monkeypatch, "eval", RECIPE, "--checkpoint", absent)
    assert f"{absent}: no config.json" in shown
    assert "no rl stage is called x" in fail(capsys, monkeypatch, "rl", RECIPE, "--stage", "x")


def test_bad_rows_are_named_before_anything_is_written(capsys, monkeypatch, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1?", "answer": "#### 2"}\n{"question": "2+2?", "answer": "four"}\n')
    data = f"stages.rl.data={{source: dataset, name: openai/gsm8k, path: {rows}}}"
    out = tmp_path / "out"
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, f"out={out}", data)
    assert str(rows) in shown and "row 1" in shown and "'answer'" in shown
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, f"out={out}", data.replace("rows", "none"))
    assert "none.jsonl" in shown
    assert not out.exists()


def test_a_folder_of_another_recipe_or_of_no_run_is_left_alone(capsys, monkeypatch, tmp_path: Path) -> None:
    folder = tmp_path / "mini"
    (folder / "cold_start/model").mkdir(parents=True)
    from megatron_parallel_r1.config import read_recipe

    (folder / "config.yaml").write_text(read_recipe(Path(RECIPE)).yaml())
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, f"out={tmp_path}", "stages.rl.steps=9")
    assert "stages.1.steps: 8 then, 9 now" in shown
    (folder / "config.yaml").unlink()
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, f"out={tmp_path}", "--fresh")
    assert "is no run folder" in shown and (folder / "cold_start").is_dir()
