"""What does not fit is named in one line, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_parallel_r1.conversion.command import (
    RESUME,
    hf_to_megatron_command,
    inspect_command,
    megatron_to_hf_command,
    verify_command,
)
from megatron_parallel_r1.conversion.shard_plan import Target
from megatron_parallel_r1.conversion.to_megatron import RELEASE, hf_to_megatron
from megatron_parallel_r1.utils.exit import run_and_exit
from tests.unit.conversion.folders import write_hf

Change = Callable[[dict[str, torch.Tensor]], object]
MOE_UP = "model.layers.3.mlp.experts.7.up_proj.weight"


def code_of(command: Callable[[list[str]], int], *words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run_and_exit(lambda: command([str(word) for word in words]), RESUME)
    return ended.value.code


def with_weights(folder: Path, change: Change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(MOE_UP), f"{MOE_UP} is missing"),
        (lambda t: t.update({"visual.weight": torch.zeros(2)}), "visual.weight is unknown"),
        (lambda t: t.update({MOE_UP: torch.zeros(39, 48)}), f"{MOE_UP} is (39, 48) instead of (40, 48)"),
        (
            lambda t: t.update({MOE_UP: torch.zeros(40, 48, dtype=torch.float8_e4m3fn)}),
            f"{MOE_UP} is of dtype F8_E4M3",
        ),
    ],
)
def test_weights_that_do_not_fit(
    change: Change, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hf(tmp_path / "hf", "qwen3_moe")
    with_weights(tmp_path / "hf", change)
    assert code_of(hf_to_megatron_command, tmp_path / "hf", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("variant", "fields", "words", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, (), "use_sliding_window = True is not supported"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, (), "mlp_only_layers = [1] is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, (), "rope_type = 'longrope'"),
        ("llama", {"mlp_bias": True}, (), "mlp_bias = True is not supported"),
        ("llama", {"model_type": "mistral"}, (), "model_type is 'mistral'"),
        (
            "llama",
            {},
            ("--tensor", 4),
            "tensor 4 does not divide the model's 2 key/value heads; give --tensor 2",
        ),
        (
            "llama",
            {},
            ("--pipeline", 3),
            "pipeline 3 does not divide the model's 4 layers; give --pipeline 2",
        ),
        ("llama", {}, ("--expert", 2), "expert 2 does not divide the model's 1 experts; give --expert 1"),
    ],
)
def test_fields_and_layouts_that_are_not_supported(
    variant: str,
    fields: dict[str, object],
    words: tuple[object, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_hf(tmp_path / "hf", variant)
    with_config(tmp_path / "hf", **fields)
    assert code_of(hf_to_megatron_command, tmp_path / "hf", tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_missing_shard_and_a_short_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", "qwen3", shards=3)
    second = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    assert code_of(hf_to_megatron_command, tmp_path / "hf", tmp_path / "out") == 2
    assert f"{second.name} is damaged (it ends within" in capsys.readouterr().err
    second.unlink()
    assert code_of(hf_to_megatron_command, tmp_path / "hf", tmp_path / "out") == 2
    assert f"{second.name}, which model.safetensors.index.json names, is missing" in capsys.readouterr().err


def test_a_checkpoint_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", "qwen3")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", Target())
    write_hf(tmp_path / "other", "llama tied")
    words = (tmp_path / "megatron", tmp_path / "back", "--like", tmp_path / "other")
    assert code_of(megatron_to_hf_command, *words) == 2
    error = capsys.readouterr().err
    assert "k_layernorm.weight is unknown" in error and "and 11 more" in error
    (tmp_path / "megatron" / "config.json").unlink()
    assert code_of(megatron_to_hf_command, tmp_path / "megatron", tmp_path / "back") == 2
    assert "--like" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_a_damaged_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", "qwen3")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", Target())
    assert code_of(inspect_command, tmp_path / "megatron", "--check") == 0
    file = tmp_path / "megatron" / RELEASE / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert code_of(inspect_command, tmp_path / "megatron", "--check") == 1
    assert "__0_0.distcp does not have its recorded digest" in capsys.readouterr().out
    assert code_of(verify_command, tmp_path / "hf", tmp_path / "megatron", "--no-logits") == 1
    assert "differs in 1 of" in capsys.readouterr().out
    file.write_bytes(content[: len(content) // 2])
    assert code_of(megatron_to_hf_command, tmp_path / "megatron", tmp_path / "back") == 2
    assert "__0_0.distcp ends within" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_verify_tells_models_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "one", "qwen2")
    write_hf(tmp_path / "two", "qwen2", seed=1)
    write_hf(tmp_path / "three", "qwen2", intermediate_size=64)
    assert code_of(verify_command, tmp_path / "one", tmp_path / "two") == 1
    assert "embed_tokens.weight differs in" in capsys.readouterr().out
    assert code_of(verify_command, tmp_path / "one", tmp_path / "three") == 1
    assert "ffn is 112 and 64" in capsys.readouterr().out
    assert code_of(verify_command, tmp_path / "one", tmp_path / "none") == 2
    hf_to_megatron(tmp_path / "one", tmp_path / "half", Target(), torch.bfloat16)
    assert code_of(verify_command, tmp_path / "half", tmp_path / "one", "--no-logits") == 1
    assert "is torch.bfloat16 and torch.float32" in capsys.readouterr().out
