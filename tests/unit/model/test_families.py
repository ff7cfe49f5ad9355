"""Each family's model computes what transformers computes, and its table moves every number both ways."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import weight_table
from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder, save_hf_folder
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.model import gpt, weights
from tests.unit.model.family_models import VARIANTS, family_model
from tests.unit.model.qwen3 import hf_logits
from tests.unit.model.rows import random_row

pytestmark = pytest.mark.usefixtures("world")
TOLERANCE = 2e-5  # the promise of the design


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each variant, as transformers saves it: experts one by one."""
    folder = tmp_path_factory.mktemp("families")
    for variant in VARIANTS:
        family_model(variant).save_pretrained(folder / variant)
    return folder


def ours_of(folder: Path, parallel: ParallelConfig | None = None) -> gpt.Model:
    shape, tensors = load_hf_folder(folder)
    model = gpt.build_model(shape, parallel=parallel)
    weights.load_hf_tensors(model, tensors)
    return model


def reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_under_a_layout_equal_transformers(variant: str, folders: Path) -> None:
    theirs, row = reference(folders / variant), random_row(5, documents=3)
    tokens_1L = torch.randint(0, 97, (1, len(row)), generator=torch.Generator().manual_seed(1))
    logits_1LV = gpt.logits(ours_of(folders / variant), tokens_1L, row.positions_1L, row.layout_KL)
    assert (logits_1LV - hf_logits(theirs, tokens_1L, row)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_names_every_parameter_and_every_tensor(variant: str, folders: Path) -> None:
    shape, tensors = load_hf_folder(folders / variant)
    loaded = dict(tensors)
    model = gpt.build_model(shape)
    weights.load_hf_tensors(model, loaded.items())
    assert {weight.name for weight in weight_table(shape)} == weights.own_parameters(model).keys()
    back = dict(weights.hf_tensors(model))
    assert back.keys() == loaded.keys()
    assert all(torch.equal(back[name], loaded[name]) for name in loaded)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_comes_back(variant: str, folders: Path) -> None:
    shape, _ = load_hf_folder(folders / variant)
    assert ModelConfig.from_hf(shape.to_hf()) == shape
    assert shape.family == variant.split()[0]


@torch.no_grad()
@pytest.mark.parametrize(
    "variant", ["qwen3_moe", "llama", "qwen2", "mistral", "mixtral", "seed_oss", "smollm3"]
)
def test_what_we_save_is_what_transformers_saved(variant: str, folders: Path, tmp_path: Path) -> None:
    model = ours_of(folders / variant)
    save_hf_folder(tmp_path / "out", model.architecture, weights.hf_tensors(model))
    tokens_1L = torch.randint(0, 97, (1, 80), generator=torch.Generator().manual_seed(2))
    one, two = (reference(folder)(tokens_1L).logits for folder in (folders / variant, tmp_path / "out"))
    assert torch.equal(one, two)


def test_gradients_of_experts_equal_transformers(folders: Path) -> None:
    theirs, ours = reference(folders / "qwen3_moe"), ours_of(folders / "qwen3_moe")
    row = random_row(3)
    tokens_1L = torch.randint(0, 97, (1, len(row)), generator=torch.Generator().manual_seed(1))
    weight_1LV = torch.randn(1, len(row), 97, generator=torch.Generator().manual_seed(0))
    (gpt.logits(ours, tokens_1L, row.positions_1L, row.layout_KL) * weight_1LV).sum().backward()
    (hf_logits(theirs, tokens_1L, row) * weight_1LV).sum().backward()
    parameters = weights.own_parameters(ours)
    for layer, block in enumerate(theirs.model.layers):
        router = parameters[f"decoder.layers.{layer}.mlp.router.weight"].grad
        # float32 sums over some hundred tokens, in another order
        assert (router - block.mlp.gate.weight.grad).abs().max() <= 1e-5 * router.abs().max()
        for expert, fused in enumerate(block.mlp.experts.gate_up_proj.grad):
            name = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight"
            grad = parameters[name].grad
            assert (grad - fused).abs().max() <= 1e-5 * fused.abs().max(), name


@pytest.mark.parametrize("variant", ["qwen3", "qwen3_moe", "qwen3_moe bare"])
def test_recomputing_changes_neither_logits_nor_gradients(variant: str, folders: Path) -> None:
    row = random_row(3)
    tokens_1L = torch.randint(0, 97, (1, len(row)), generator=torch.Generator().manual_seed(1))
    weight_1LV = torch.randn(1, len(row), 97, generator=torch.Generator().manual_seed(0))

    def logits_and_gradients(recompute: str) -> dict[str, torch.Tensor]:
        model = ours_of(folders / variant, ParallelConfig(recompute=recompute)).train()
        logits_1LV = gpt.logits(model, tokens_1L, row.positions_1L, row.layout_KL)
        (logits_1LV * weight_1LV).sum().backward()
        gradients = {name: parameter.grad for name, parameter in weights.own_parameters(model).items()}
        return {"logits": logits_1LV.detach(), **gradients}

    stored = logits_and_gradients("none")
    for recompute in ("selective", "full"):
        again = logits_and_gradients(recompute)
        assert [name for name in stored if not torch.equal(stored[name], again[name])] == []
