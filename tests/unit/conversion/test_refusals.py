"""What does not fit is named in one line, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
from megatron_parallel_r1.conversion.command import (
    RESUME,
    hf_to_megatron_command,
    inspect_command,
    megatron_to_hf_command,
    verify_command,
)
from megatron_parallel_r1.conversion.shard_plan import Target
from megatron_parallel_r1.conversion.to_megatron import RELEASE, hf_to_megatron
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.exit import run_and_exit
from tests.serve.release import tokenizer
from tests.unit.conversion.folders import assert_equal, tensors_of, write_hf

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
        ("llama", {"model_type": "gemma"}, (), "model_type is 'gemma'"),
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


QKV = "model.layers.1.self_attn.{}_proj.weight"
BIASED = "model.layers.0.self_attn.{}_proj.bias"
MLP = "model.layers.2.mlp.{}_proj.weight"
EXPERT = "model.layers.1.mlp.experts.{}.down_proj.weight"


@pytest.mark.parametrize(
    ("variant", "odd", "named"),
    [
        ("qwen3", QKV.format("v"), QKV.format("q")),
        ("qwen2", BIASED.format("k"), BIASED.format("q")),
        ("llama", MLP.format("up"), MLP.format("gate")),
        ("qwen3_moe", EXPERT.format(6), EXPERT.format(0)),
    ],
)
def test_parts_of_one_matrix_in_several_dtypes(
    variant: str, odd: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None is cast to another's dtype, where 1e6 is infinite, unless a dtype is given."""
    write_hf(tmp_path / "hf", variant)

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[named] = tensors[named].half()
        tensors[odd].view(-1)[5] = 1e6

    with_weights(tmp_path / "hf", narrow)
    assert code_of(hf_to_megatron_command, tmp_path / "hf", tmp_path / "out") == 2
    assert f"{named} is F16 and" in capsys.readouterr().err
    assert code_of(hf_to_megatron_command, tmp_path / "hf", tmp_path / "out", "--dtype", "float16") == 2
    assert f"{odd} has values that F16 cannot hold; give --dtype float32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert code_of(hf_to_megatron_command, tmp_path / "hf", tmp_path / "out", "--dtype", "float32") == 0
    assert code_of(megatron_to_hf_command, tmp_path / "out", tmp_path / "back") == 0
    expected = {name: tensor.float() for name, tensor in tensors_of(tmp_path / "hf").items()}
    assert_equal(expected, tensors_of(tmp_path / "back"))
    # From one Hugging Face folder to another each keeps its own.
    assert code_of(megatron_to_hf_command, tmp_path / "hf", tmp_path / "copy") == 0
    assert_equal(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "copy"))
    assert code_of(megatron_to_hf_command, tmp_path / "hf", tmp_path / "half", "--dtype", "float16") == 2
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_model_with_a_head_of_its_own(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers 5 keeps the head, transformers 4 ties it."""
    write_hf(tmp_path / "hf", "llama tied")

    def with_head(tensors: dict[str, torch.Tensor], change: float = 0.0) -> None:
        embedding = tensors["model.embed_tokens.weight"].to(dtype)
        tensors["model.embed_tokens.weight"] = embedding
        tensors["lm_head.weight"] = embedding.float().clone()
        tensors["lm_head.weight"][60, 7] += change

    with_weights(tmp_path / "hf", with_head)
    load_hf_folder(tmp_path / "hf")
    with_weights(tmp_path / "hf", lambda tensors: with_head(tensors, 1.0))
    for command in (hf_to_megatron_command, megatron_to_hf_command):
        assert code_of(command, tmp_path / "hf", tmp_path / "out") == 2
        shown = capsys.readouterr().err
        assert "lm_head.weight differs from model.embed_tokens.weight" in shown and "to false" in shown
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_hf_folder(tmp_path / "hf")
    assert not (tmp_path / "out").exists()


def test_shards_without_their_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", "qwen3", shards=3)
    shutil.copytree(tmp_path / "hf", tmp_path / "other")
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    for command, *words in (
        (verify_command, tmp_path / "hf", tmp_path / "other"),
        (verify_command, tmp_path / "other", tmp_path / "hf"),
        (hf_to_megatron_command, tmp_path / "hf", tmp_path / "out"),
        (inspect_command, tmp_path / "hf"),
    ):
        assert code_of(command, *words) == 2
        assert "but neither model.safetensors nor model.safetensors.index.json" in capsys.readouterr().err
    # transformers prefers the single file where both are there.
    write_hf(tmp_path / "other", "qwen3", seed=1)
    write_hf(tmp_path / "one", "qwen3", seed=1)
    assert code_of(verify_command, tmp_path / "other", tmp_path / "one", "--no-logits") == 0


def test_what_transformers_alone_refuses_is_no_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hf(tmp_path / "hf", "qwen2")
    with_config(tmp_path / "hf", max_window_layers="many")
    assert code_of(verify_command, tmp_path / "hf", tmp_path / "hf") == 2
    assert "transformers cannot load it (" in capsys.readouterr().err


@pytest.mark.parametrize(
    "header",
    [
        b"5",
        b"[]",
        b'{"a": 5}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
        b'{"a": {"shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.5, 4]}}',
    ],
)
def test_damaged_headers(header: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", "qwen3")
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    (tmp_path / "hf" / "model.safetensors").write_bytes(content)
    assert code_of(hf_to_megatron_command, tmp_path / "hf", tmp_path / "out") == 2
    assert "model.safetensors is damaged (" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["there", "back"])
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{}", "the tokenizer cannot be loaded"),
        ("chat_template.jinja", "{{ messages[0]", "the chat template fails on a user's message"),
        ("generation_config.json", '{"eos_token_id": [2, "x"]}', "eos_token_id = [2, 'x'] is no token id"),
    ],
)
def test_a_tokenizer_is_tried_before_anything_is_written(
    file: str, content: str, message: str, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hf(tmp_path / "hf", "qwen3")
    tokenizer().save_pretrained(tmp_path / "hf")
    command, source = hf_to_megatron_command, tmp_path / "hf"
    if way == "back":
        hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", Target())
        command, source = megatron_to_hf_command, tmp_path / "megatron"
    (source / file).write_text(content)
    assert code_of(command, source, tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("error:") == 1
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


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
