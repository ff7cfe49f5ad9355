"""Recipes, overrides and run folders with the key names of release 0.1 are read for one more release."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_parallel_r1.config import deprecated
from megatron_parallel_r1.config.reader import read_recipe, read_run_recipe
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.run.folder import as_begun, is_resumable

SHAPE = "{hidden: 32, layers: 2, heads: 4, kv_heads: 2, head_dim: 8, ffn: 64}"
OLD = f"""
name: old
model: {{shape: {SHAPE}}}
tokenizer: {{kind: bpe, vocab: 300, texts: []}}
prompt: parallel
micro_tokens: 512
rollout: {{concurrent: 64}}
stages:
  - name: cold_start
    kind: sft
    data: {{source: embedded_cold_start}}
    steps: 30
    batch: 8
    optimizer: {{lr: 1.0e-2, warmup: 3, final: 0.1, clip: 0.5}}
  - &rl
    name: rl
    kind: rl
    start: cold_start
    data: {{source: embedded, kind: easy}}
    steps: 8
    prompts: 3
    samples: 4
    concurrent: 7
    max_staleness: 1
    partial: true
    dynamic: {{rounds: 2, over_sample: 1.5}}
    until: {{metric: reward, best: max, least_gain: 0.1, least_steps: 5}}
    optimizer: {{lr: 1.0e-3}}
  - {{<<: *rl, name: rl_2}}
evaluation: {{data: {{source: embedded, kind: hard}}, count: 24, samples: 2, concurrent: 9}}
decontamination: {{words: 9, common: 5, least_share: 0.5}}
"""
NEW = f"""
name: old
model: {{shape: {SHAPE}}}
tokenizer: {{kind: bpe, vocab_size: 300, texts: []}}
prompt_template: parallel
max_tokens_per_micro_batch: 512
rollout: {{max_concurrent_requests: 64}}
stages:
  - name: cold_start
    kind: sft
    data: {{source: embedded_cold_start}}
    steps: 30
    examples_per_step: 8
    optimizer: {{lr: 1.0e-2, warmup_steps: 3, final_lr_fraction: 0.1, clip_grad_norm: 0.5}}
  - &rl
    name: rl
    kind: rl
    start_from: cold_start
    data: {{source: embedded, kind: easy}}
    steps: 8
    prompts_per_step: 3
    samples_per_prompt: 4
    max_concurrent_rollouts: 7
    max_off_policy_steps: 1
    partial_rollout: true
    dynamic_sampling: {{max_rounds: 2, oversampling: 1.5}}
    early_stopping: {{metric: reward, mode: max, min_delta: 0.1, min_steps: 5}}
    optimizer: {{lr: 1.0e-3}}
  - {{<<: *rl, name: rl_2}}
evaluation:
  {{data: {{source: embedded, kind: hard}}, problems: 24, samples_per_problem: 2, max_concurrent_rollouts: 9}}
decontamination: {{ngram_size: 9, max_problems_per_ngram: 5, min_overlap: 0.5}}
"""


@pytest.fixture(autouse=True)
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deprecated, "_warned", set())


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "old.yaml").write_text(OLD)
    return tmp_path / "old.yaml"


@pytest.fixture
def new(tmp_path: Path) -> Path:
    (tmp_path / "new.yaml").write_text(NEW)
    return tmp_path / "new.yaml"


def with_old_keys(recipe: Recipe) -> str:
    """What release 0.1 wrote into a run folder."""

    def renamed(value: object, path: tuple[str, ...]) -> object:
        if isinstance(value, list):
            return [renamed(item, (*path, "*")) for item in value]
        if not isinstance(value, dict):
            return value
        back = {
            (pattern.rpartition(".")[0], name): pattern.rpartition(".")[2]
            for pattern, name in deprecated.RENAMED.items()
        }
        return {
            back.get((".".join(path), key), key): renamed(inner, (*path, key)) for key, inner in value.items()
        }

    return yaml.safe_dump(renamed(recipe.model_dump(mode="json"), ()), sort_keys=False)


def test_an_old_recipe_is_the_new_one(old: Path, new: Path) -> None:
    assert read_recipe(old) == read_recipe(new)


def test_every_old_key_is_named_in_one_line(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read_recipe(old)
    read_recipe(old)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(deprecated.RENAMED) and all(line.startswith("warning: ") for line in lines)
    assert f"warning: {old}: stages.rl.prompts is now stages.rl.prompts_per_step; the next" in "\n".join(
        lines
    )


def test_only_rank_zero_warns(
    old: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    read_recipe(old)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("fixture", ["old", "new"])
def test_old_keys_on_the_command_line(
    fixture: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "stages.rl.prompts=5",
        "stages.1.until.best=min",
        "evaluation={data: {source: embedded}, count: 3}",
    )
    recipe = read_recipe(request.getfixturevalue(fixture), words)
    stage = recipe.stages[1]
    assert (stage.prompts_per_step, stage.early_stopping.mode) == (5, "min")
    assert recipe.evaluation.problems == 3
    if fixture == "new":
        first, *_ = capsys.readouterr().err.splitlines()
        assert first == (
            "warning: override stages.rl.prompts=5: stages.rl.prompts is now stages.rl.prompts_per_step; "
            "the next release drops the old name"
        )


def test_an_override_of_one_stage_leaves_stages_of_the_same_anchor_alone(new: Path) -> None:
    recipe = read_recipe(new, ["stages.rl.optimizer.lr=5.0e-3"])
    assert [stage.optimizer.lr for stage in recipe.stages[1:]] == [5e-3, 1e-3]


def test_both_names_are_refused(new: Path) -> None:
    new.write_text(NEW.replace("    prompts_per_step: 3", "    prompts_per_step: 3\n    prompts: 3"))
    with pytest.raises(UserError, match=r"stages\.rl\.prompts is the old name of prompts_per_step"):
        read_recipe(new)


def test_the_file_of_one_stage(old: Path) -> None:
    single = old.with_name("rl.yaml")
    single.write_text("recipe: old.yaml\nstage: rl\n")
    assert read_recipe(single).stages[1].samples_per_prompt == 4


def test_an_old_run_goes_on_without_adapt(new: Path, tmp_path: Path) -> None:
    recipe = read_recipe(new)
    folder = tmp_path / "runs/old"
    (folder / "cold_start/model").mkdir(parents=True)
    (folder / "stages.json").write_text('["cold_start", "rl", "rl_2"]')
    before = with_old_keys(recipe).replace("  new_rows: subwords\n", "")
    (folder / "config.yaml").write_text(before)
    assert "new_rows" not in before
    assert "\nmicro_tokens: 512\n" in (folder / "config.yaml").read_text()
    assert is_resumable(recipe, folder, fresh=False)
    assert read_run_recipe(folder / "config.yaml") == recipe
    # It began before new rows had another start.
    assert recipe.model.new_rows == "subwords"
    assert as_begun(recipe, folder).model.new_rows == "mean"
    with pytest.raises(UserError, match=r"stages\.rl\.prompts_per_step: 3 then, 5 now"):
        is_resumable(read_recipe(new, ["stages.rl.prompts=5"]), folder, fresh=False)
