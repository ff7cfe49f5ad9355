"""A release of a run's checkpoint, in either form, loads wherever a release must."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.checkpoint_formats.hf_folder import save_hf_folder
from megatron_parallel_r1.conversion.command import RESUME, release_command
from megatron_parallel_r1.conversion.shard_plan import Target
from megatron_parallel_r1.conversion.to_megatron import hf_to_megatron
from megatron_parallel_r1.data.prompts import TEMPLATES, encode_prompt
from megatron_parallel_r1.evaluation.checkpoints import open_checkpoint
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.thought.tags import TAG_TEXTS, Tags
from megatron_parallel_r1.utils.exit import run_and_exit
from tests.serve.release import THINKING, tokenizer, words
from tests.unit.conversion.folders import assert_equal, tensors_of
from tests.unit.rollout.tiny import tiny_qwen3

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
name: made_up
model: {shape: {hidden: 32, layers: 2, heads: 4, kv_heads: 2, head_dim: 16, ffn: 48, rope_theta: 1000}}
tokenizer: {kind: embedded}
prompt_template: plain
thinking: {mode: isolated, paths: 3, max_path_tokens: 40, max_response_tokens: 300}
evaluation: {data: {source: embedded, kind: hard}}
stages:
  - name: cold_start
    kind: sft
    data: {source: embedded_cold_start}
    steps: 3
    examples_per_step: 4
    optimizer: {lr: 1e-3}
  - name: rl
    kind: rl
    data: {source: embedded, kind: easy}
    steps: 2
    prompts_per_step: 2
    samples_per_prompt: 2
    reward: {name: accuracy_x_parallel}
    optimizer: {lr: 1e-4}
"""
EVALUATION = {"stage": "rl", "step": 2, "mode": "isolated", "accuracy": 0.5, "ci95": 0.02, "problems": 64}


def code_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run_and_exit(lambda: release_command([str(word) for word in arguments]), RESUME)
    return ended.value.code


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended, as far as a release looks at it."""
    folder = tmp_path_factory.mktemp("runs") / "made_up"
    folder.mkdir()
    (folder / "config.yaml").write_text(RECIPE)
    (folder / "stages.json").write_text(json.dumps(["cold_start", "rl"]))
    records = [EVALUATION | {"stage": "cold_start", "step": 3, "accuracy": 0.25}, EVALUATION]
    (folder / "eval.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for stage, steps in (("cold_start", 3), ("rl", 2)):
        (folder / stage).mkdir()
        lines = [json.dumps({"step": 1 + step}) + "\n" for step in range(steps)]
        (folder / stage / "metrics.jsonl").write_text("".join(lines))
    model = tiny_qwen3()
    shape = ModelConfig.from_hf(model.config.to_dict())
    save_hf_folder(folder / "rl" / "model", shape, model.state_dict().items(), tokenizer())
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def test_a_run_is_released(run: Path, tmp_path: Path) -> None:
    (tmp_path / "math.md").write_text("| benchmark | accuracy |\n|---|---|\n| aime24 | 12.3 % |\n")
    words_ = (run, tmp_path / "out", "--evaluation", tmp_path / "math.md", "--shard-gb", 0.00002)
    assert code_of(*words_) == 0
    assert_equal(tensors_of(run / "rl" / "model"), tensors_of(tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(30)[None]
    assert torch.equal(theirs.eval()(tokens).logits, tiny_qwen3()(tokens).logits)
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.convert_tokens_to_ids(list(TAG_TEXTS)) == list(range(len(TAG_TEXTS)))
    assert theirs.generation_config.eos_token_id == found.eos_token_id == Tags.of(found).eos
    card = (tmp_path / "out" / "README.md").read_text()
    for phrase in (
        "| cold_start | sft | embedded_cold_start | 3 |",
        "| rl | rl | embedded (easy) | 2 |",
        "25.0",
        "50.0",
        "aime24",
        "## Data",
    ):
        assert phrase in card, phrase
    assert "`embedded`: synthetic" in card and "held out" in card and "license: apache-2.0" in card


def test_its_settings_are_those_of_the_run(run: Path, tmp_path: Path) -> None:
    assert code_of(run, tmp_path / "out") == 0
    decoding = open_checkpoint(tmp_path / "out").decoding
    assert decoding.thinking == Thinking(paths=3, max_path_tokens=40, max_response_tokens=300)
    assert decoding.template == TEMPLATES["plain"]


@pytest.mark.parametrize("place", ["rl/checkpoints/step_000001", "rl/model", "cold_start/model", "elsewhere"])
def test_a_checkpoint_of_a_run_is_described_as_what_it_is(place: str, run: Path, tmp_path: Path) -> None:
    """A copy of the run, in which something else than the end of its last stage is released."""
    folder = tmp_path / "made_up"
    shutil.copytree(run, folder)
    recipe = RECIPE.replace(
        "    prompts_per_step: 2", "    thinking: {mode: replay, paths: 5}\n    prompts_per_step: 2"
    )
    (folder / "config.yaml").write_text(recipe)
    source = tmp_path / "elsewhere" if place == "elsewhere" else folder / place
    if not source.exists():
        shutil.copytree(run / "rl" / "model", source)
    flags = ("--stage", "cold_start") if place == "elsewhere" else ()
    assert code_of(source, tmp_path / "out", "--run", folder, *flags) == 0
    card = (tmp_path / "out" / "README.md").read_text().split("<details>")[0]
    evaluated = (tmp_path / "out" / "README.md").read_text().split("## Evaluation")[1]
    found = open_checkpoint(tmp_path / "out")
    thinking = found.decoding.thinking
    stored = json.loads((tmp_path / "out" / "thinking.json").read_text())
    assert "| cold_start | sft | embedded_cold_start | 3 |" in card and "25.0" in evaluated
    if place.startswith("rl"):
        steps = 1 if "step" in place else 2
        assert f"| rl | rl | embedded (easy) | {steps} |" in card
        assert (stored["stage"], found.step) == ("rl", 3 + steps)
        assert (thinking.mode, thinking.paths) == ("replay", 5) and "reads them as one text" in card
        assert ("50.0" in evaluated) == (steps == 2)
    else:
        assert "| rl |" not in card and "50.0" not in evaluated
        assert (stored["stage"], found.step) == ("cold_start", 3)
        assert (thinking.mode, thinking.paths) == ("isolated", 3) and "with 3 paths" in card


def test_where_a_checkpoint_comes_from_must_be_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "rl" / "model", tmp_path / "model")
    assert code_of(tmp_path / "model", tmp_path / "out", "--run", run) == 2
    assert "give --stage, one of cold_start, rl" in capsys.readouterr().err
    assert code_of(tmp_path / "model", tmp_path / "out", "--run", run, "--stage", "sft") == 2
    assert "has no stage sft; give --stage, one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("head", "licence"),
    [
        ("---\nlicense: llama3.2\n---\n# Llama", "license: llama3.2"),
        ("---\nlicense: other\nlicense_name: qwen\n---\n", "license: other\nlicense_name: qwen"),
        ("# no head", "license: unknown"),
    ],
)
def test_the_licence_is_that_of_the_base(head: str, licence: str, run: Path, tmp_path: Path) -> None:
    base, folder = tmp_path / "Base-1B", tmp_path / "made_up"
    base.mkdir()
    (base / "README.md").write_text(head)
    shutil.copytree(run, folder)
    shape = RECIPE.splitlines()[2]
    (folder / "config.yaml").write_text(RECIPE.replace(shape, f"model: {{path: {base}}}"))
    assert code_of(folder, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{licence}\nbase_model: Base-1B\n" in card and "apache" not in card.split("---")[1]
    assert "tags: [parallel-thinking, sft, reinforcement-learning, grpo]" in card


def test_a_card_names_the_run_that_a_model_is_of_and_no_method_that_was_not_used(
    run: Path, tmp_path: Path
) -> None:
    before, folder = tmp_path / "before", tmp_path / "after"
    (before / "sft" / "model").mkdir(parents=True)
    (before / "config.yaml").touch()
    shutil.copytree(run, folder)
    shape = RECIPE.splitlines()[2]
    (folder / "config.yaml").write_text(RECIPE.replace(shape, f"model: {{path: {before / 'sft' / 'model'}}}"))
    words = ("--run", folder, "--stage", "cold_start")
    assert code_of(folder / "rl" / "model", tmp_path / "out", *words) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: before-sft\n" in card and "tags: [parallel-thinking, sft]" in card
    assert "`before-sft`, whose licence" in card


def test_its_chat_template_makes_the_prompt_of_the_training(run: Path, tmp_path: Path) -> None:
    assert code_of(run, tmp_path / "out") == 0
    released, trained = AutoTokenizer.from_pretrained(tmp_path / "out"), tokenizer()
    assert trained.chat_template is None and released.chat_template is not None
    chat = released.apply_chat_template([{"role": "user", "content": "w9 w12"}], tokenize=False)
    assert chat == "w9 w12\n"
    assert encode_prompt(released, "plain", "w9 w12") == encode_prompt(trained, "plain", "w9 w12")


def test_a_megatron_checkpoint_is_released_as_its_source_is(run: Path, tmp_path: Path) -> None:
    hf_to_megatron(run / "rl" / "model", tmp_path / "megatron", Target(2, 2))
    (tmp_path / "thinking.json").write_text(
        json.dumps(THINKING.model_dump() | {"prompt_template": "Q {problem}"})
    )
    flags = ("--thinking", tmp_path / "thinking.json", "--dtype", "bfloat16")
    assert code_of(tmp_path / "megatron", tmp_path / "out", *flags) == 0
    narrowed = {name: t.to(torch.bfloat16) for name, t in tensors_of(run / "rl" / "model").items()}
    assert_equal(narrowed, tensors_of(tmp_path / "out"))
    assert open_checkpoint(tmp_path / "out").decoding.thinking == THINKING


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("rl/model",), "thinking.json is missing; give --thinking"), (("rl",), "no config.json")],
)
def test_what_is_missing_is_named(
    arguments: tuple[str, ...], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(*(run / part for part in arguments), tmp_path / "out") == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_the_example_thinks_with_it(run: Path, tmp_path: Path) -> None:
    assert code_of(run, tmp_path / "out") == 0
    done = subprocess.run(
        [sys.executable, "examples/think_in_parallel.py", str(tmp_path / "out"), words()[9]],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "tokens," in done.stderr and done.stdout.strip()
