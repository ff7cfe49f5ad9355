"""Weights travel to Megatron and back bit for bit, and misfits are named before anything is written."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import weight_table
from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder, save_hf_folder
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model import gpt, weights
from tests.unit.model.qwen3 import hf_model
from tests.unit.model.rows import causal_row

pytestmark = pytest.mark.usefixtures("world")


def tiny(tied: bool = True) -> ModelConfig:
    return ModelConfig.from_hf(hf_model(tied).config.to_dict())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_round_trip_is_bit_equal(tied: bool, kv_heads: int) -> None:
    theirs = hf_model(tied, kv_heads)
    model = gpt.build_model(ModelConfig.from_hf(theirs.config.to_dict()))
    weights.load_hf_tensors(model, theirs.state_dict().items())
    back = dict(weights.hf_tensors(model))
    expected = dict(theirs.named_parameters())
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)


def test_the_table_names_every_parameter() -> None:
    for tied in (True, False):
        model = gpt.build_model(tiny(tied))
        names = {weight.name for weight in weight_table(model.architecture)}
        assert names == weights.own_parameters(model).keys() == dict(model[0].named_parameters()).keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is unknown"),
        (
            lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.zeros(2, 48)}),
            r"k_proj.weight is \(2, 48\) instead of \(32, 48\)",
        ),
        (lambda t: [t.pop(name) for name in list(t)[:9]], "and 4 more"),
    ],
)
def test_misfits_are_named_and_nothing_is_written(change, message: str) -> None:
    model = gpt.build_model(tiny())
    weights.load_hf_tensors(model, weights.random_hf_tensors(model.architecture, seed=1))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    tensors = dict(weights.random_hf_tensors(model.architecture, seed=2))
    change(tensors)
    with pytest.raises(UserError, match=message):
        weights.load_hf_tensors(model, tensors.items())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    first, again, other = (dict(weights.random_hf_tensors(tiny(), seed)) for seed in (1, 1, 2))
    name = "model.layers.2.mlp.gate_proj.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], other[name])
    assert first[name].std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(first["model.norm.weight"], torch.ones(48))


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_folder_loads_in_transformers_and_here(tied: bool, tmp_path: Path) -> None:
    model = gpt.build_model(tiny(tied))
    weights.load_hf_tensors(model, weights.random_hf_tensors(model.architecture, seed=3))
    for _ in range(2):  # the second time it replaces the first
        save_hf_folder(tmp_path / "out", model.architecture, weights.hf_tensors(model))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    row = causal_row(50)
    tokens_1L = torch.randint(0, 97, (1, 50))
    logits_1LV = gpt.logits(model, tokens_1L, row.positions_1L, row.layout_KL)
    assert (theirs(tokens_1L).logits - logits_1LV).abs().max() < 2e-5

    # Others may read it, if the umask lets them read anything.
    rights = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(rights) == 1

    config, tensors = load_hf_folder(tmp_path / "out")
    assert config == model.architecture
    expected = dict(weights.hf_tensors(model))
    assert all(torch.equal(expected.pop(name), tensor) for name, tensor in tensors) and not expected


def test_a_tokenizer_is_saved_and_its_eos_ends_generation(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "one": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    save_hf_folder(tmp_path / "out", tiny(), weights.random_hf_tensors(tiny(), 0), tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("one") == [2]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 1


def test_a_tied_checkpoint_may_carry_its_head() -> None:
    theirs = hf_model(tied=True)
    model = gpt.build_model(tiny())
    assert "lm_head.weight" in theirs.state_dict()
    weights.load_hf_tensors(model, theirs.state_dict().items())


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load_hf_folder(tmp_path)
    config = tmp_path / "config.json"
    for broken in (b"{", b'{"model_type": "\xff"}'):
        config.write_bytes(broken)
        with pytest.raises(UserError, match="is not valid JSON"):
            load_hf_folder(tmp_path)
    config.write_text("[1]")
    with pytest.raises(UserError, match="is not a JSON object"):
        load_hf_folder(tmp_path)
    with pytest.raises(UserError, match=r"no config\.json; give the folder"):
        load_hf_folder(config)
    config.write_text(json.dumps(tiny().to_hf()))
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        load_hf_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"oops")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        dict(load_hf_folder(tmp_path)[1])


def test_saving_spares_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a Hugging Face model"):
        save_hf_folder(tmp_path, tiny(), weights.random_hf_tensors(tiny(), 0))
    assert (tmp_path / "notes.txt").read_text() == "mine"
