"""What a user can get wrong ends in one line that names it, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_parallel_r1 import cli

RECIPE = str(Path(__file__).parent / "mini.yaml")


def fail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["parallel-r1", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    *warnings, shown = capsys.readouterr().err.strip().splitlines()
    assert all(line.startswith("warning: ") for line in warnings) and shown.startswith("error: ")
    return shown


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seeed=1", "seeed: unknown key; did you mean seed?"),
        ("stages.rl.stepz=1", "stages.rl.stepz: unknown key; did you mean steps?"),
        ("stages.rl.lrr=1", "stages.rl.lrr: unknown key; did you mean optimizer.lr?"),
        ("model.shape.hiden=1", "model.shape.hiden: unknown key; did you mean hidden?"),
        ("stages.rl.reward.weights=1", "stages.rl.reward.weights: unknown key"),
        ("stages.cold_start.data.style={blockz: 1}", "stages.cold_start.data.style.blockz: unknown key"),
        ("stages.rl.steps=many", "stages.rl.steps: Input should be a valid integer"),
        ("stages.rl.steps=0", "stages.rl.steps: Input should be greater than or equal to 1"),
        ("stages.nope.steps=1", "no nope in the list, it has cold_start, rl"),
        ("stages.rl.thinking.pathz=2", "stage rl: thinking.pathz: unknown key; did you mean paths?"),
        ("stages.rl.thinking.paths=9", "stage rl: thinking.paths: Input should be less than or equal to 8"),
        ("stages.rl.start_from=rl", "stage rl: starts from rl, which is no stage before it that trains"),
        ("stages.rl.reward.name=fame", "reward 'fame': unknown"),
        ("thinking.mode=psychic", "thinking.mode: Input should be"),
        ("model.path=/somewhere", "give either shape"),
        ("evaluation=null", "wants an evaluation"),
        ("steps", "write key=value"),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
        ("seeds=[]", "seeds: Tuple should have at least 1 item"),
        ("seeds=[1, 1]", "a seed stands twice"),
        ("prompt_template=nonsense", "prompt_template 'nonsense' is no template"),
        ("model.shape.head_dim=7", "head_dim 7 is odd"),
        ("model.shape.kv_heads=3", "4 attention heads cannot share 3 key/value heads evenly"),
        ("model={path: /nope}", "/nope: no config.json"),
        ("stages.cold_start.name=release", "stage release: the run folder uses that name itself"),
        ("stages.rl.thinking.temperature=0", "at temperature 0 all traces of a group are the same"),
        ("stages.rl.thinking.top_p=0.9", "stage rl: thinking.top_p 0.9 cuts the distribution"),
        ("thinking.top_k=20", "stage rl: thinking.top_k 20 cuts the distribution"),
        ("evaluation.problems=100000", "100000 problems wanted, 7176 are held out"),
        (
            "stages.rl.early_stopping.metric=rewrd",
            "stages.rl: early_stopping.metric 'rewrd' is none of reward, accuracy",
        ),
        (
            "stages.cold_start.early_stopping.metric=reward",
            "stages.cold_start: early_stopping.metric 'reward' is none of loss",
        ),
        ("stages.rl.objective.overlong_cache=81", "overlong_cache 81 is more than the 80 tokens"),
        ("stages.rl.reference_every=2", "there is no reference without objective.kl"),
        ("stages.rl.optimizer.lr=.inf", "stages.rl.optimizer.lr: Input should be a finite number"),
        ("stages.rl.optimizer.betas=[0.9, 1.5]", "betas.1: Input should be less than 1"),
        ("tokenizer={kind: folder}", "tokenizer: give path"),
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


def test_evaluation_problems_that_a_stage_trains_on_are_refused(capsys, monkeypatch, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1?", "answer": "#### 2"}\n{"question": "2+2?", "answer": "#### 4"}\n')
    data = f"{{source: dataset, name: openai/gsm8k, path: {rows}}}"
    words = (
        f"out={tmp_path}/out",
        f"stages.rl.data={data}",
        f"evaluation.data={data}",
        "evaluation.problems=1",
    )
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, *words)
    assert "stage rl trains on 1 of its 1 problems, such as '1+1?'" in shown
    assert not (tmp_path / "out").exists()


def test_an_impossible_folder(capsys, monkeypatch) -> None:
    assert "choose another" in fail(capsys, monkeypatch, "curriculum", RECIPE, "out=/dev/null")


def test_numbers_that_are_no_longer_finite_end_the_run(capsys, monkeypatch, tmp_path: Path) -> None:
    words = (f"out={tmp_path}", "stages.cold_start.optimizer={lr: 1.0e+30}")
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, *words)
    assert "3 times in a row" in shown and "Lower the stage's optimizer.lr; --adapt" in shown
    assert len((tmp_path / "mini/cold_start/bad_steps.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "mini/cold_start/model").exists()


def test_a_folder_of_another_recipe_or_of_no_run_is_left_alone(capsys, monkeypatch, tmp_path: Path) -> None:
    folder = tmp_path / "mini"
    (folder / "cold_start/model").mkdir(parents=True)
    from megatron_parallel_r1.config.reader import read_recipe

    (folder / "config.yaml").write_text(read_recipe(Path(RECIPE)).yaml())
    (folder / "stages.json").write_text('["cold_start", "rl"]')
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, f"out={tmp_path}", "stages.rl.steps=9")
    assert "stages.rl.steps: 8 then, 9 now" in shown
    (folder / "config.yaml").unlink()
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, f"out={tmp_path}", "--fresh")
    assert "is not a run folder" in shown and (folder / "cold_start").is_dir()


def test_under_torchrun_one_process_speaks_for_all(tmp_path: Path) -> None:
    """What is wrong is wrong on all of them, and torchrun ends the others with the first."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    train = ("-m", "megatron_parallel_r1.cli", "sft", str(tmp_path / "no.yaml"))
    done = subprocess.run([sys.executable, *launcher, *train], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line and "no.yaml: No such" in line]
    assert line.startswith("error: ")
