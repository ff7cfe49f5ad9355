"""The Megatron model computes what transformers computes, under any layout."""

import pytest
import torch
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import weight_table
from megatron_parallel_r1.model import gpt, weights
from megatron_parallel_r1.model.spec import RMSNorm
from megatron_parallel_r1.model.transformer import PositionRotary, transformer_config
from tests.unit.model.qwen3 import hf_logits, hf_model
from tests.unit.model.rows import Row, causal_row, random_row

pytestmark = pytest.mark.usefixtures("world")
TOLERANCE = 2e-5  # the promise of the design


def ours_of(theirs: Qwen3ForCausalLM, dtype: torch.dtype = torch.float32) -> gpt.PathGPT:
    model = gpt.build_model(ModelConfig.from_hf(theirs.config.to_dict()), dtype)
    weights.load_hf_tensors(model, theirs.state_dict().items())
    return model


def tokens_of(row: Row) -> torch.Tensor:
    return torch.randint(0, 97, (1, len(row)), generator=torch.Generator().manual_seed(len(row)))


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_plain_causal_logits_equal_transformers(tied: bool, kv_heads: int) -> None:
    theirs = hf_model(tied, kv_heads)
    row = causal_row(200)
    tokens_1L = tokens_of(row)
    logits_1LV = gpt.logits(ours_of(theirs), tokens_1L, row.positions_1L, row.layout_KL)
    assert logits_1LV.shape == (1, 200, 97)
    assert (logits_1LV - theirs(tokens_1L).logits).abs().max() <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_logits_under_a_layout_equal_transformers(seed: int) -> None:
    theirs = hf_model(tied=bool(seed % 2), seed=seed)
    row = random_row(seed, documents=1 + seed % 3, depth=1 + seed % 3)
    tokens_1L = tokens_of(row)
    logits_1LV = gpt.logits(ours_of(theirs), tokens_1L, row.positions_1L, row.layout_KL)
    assert (logits_1LV - hf_logits(theirs, tokens_1L, row)).abs().max() <= TOLERANCE


def test_gradients_equal_transformers() -> None:
    theirs = hf_model(tied=True)
    ours, row = ours_of(theirs), random_row(3)
    tokens_1L = tokens_of(row)
    weight_1LV = torch.randn(1, len(row), 97, generator=torch.Generator().manual_seed(0))
    (gpt.logits(ours, tokens_1L, row.positions_1L, row.layout_KL) * weight_1LV).sum().backward()
    (hf_logits(theirs, tokens_1L, row) * weight_1LV).sum().backward()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    parameters = weights.own_parameters(ours)
    for weight in weight_table(ours.architecture):
        parts = weight.split([parameters[weight.name].grad])
        for (name, _shape), grad in zip(weight.parts, parts, strict=True):
            assert (grad - grads[name]).abs().max() <= 1e-5 * grads[name].abs().max(), name


@torch.no_grad()
def test_a_hidden_sibling_changes_nothing() -> None:
    """Another first path, of the same length, leaves the second path's logits bit-equal."""
    ours = ours_of(hf_model(tied=True))
    row = causal_row(100)
    layout_KL = torch.cat([row.layout_KL, torch.zeros(2, 100, dtype=torch.int32)])
    layout_KL[2, 50:80], layout_KL[3, 50:80] = 20, 50
    tokens_1L = tokens_of(row)
    others_1L = tokens_1L.clone()
    others_1L[:, 20:50] = (others_1L[:, 20:50] + 1) % 97
    first_1LV, second_1LV = (gpt.logits(ours, t, row.positions_1L, layout_KL) for t in (tokens_1L, others_1L))
    assert torch.equal(first_1LV[:, :20], second_1LV[:, :20])
    assert torch.equal(first_1LV[:, 50:80], second_1LV[:, 50:80])
    assert not torch.equal(first_1LV[:, 80:], second_1LV[:, 80:])


@torch.no_grad()
def test_bfloat16_is_close_to_float32() -> None:
    theirs, row = hf_model(tied=True), random_row(1)
    tokens_1L = tokens_of(row)
    narrow_1LV, wide_1LV = (
        gpt.logits(ours_of(theirs, dtype), tokens_1L, row.positions_1L, row.layout_KL)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert narrow_1LV.dtype == torch.bfloat16
    assert (narrow_1LV - wide_1LV).norm() < 0.05 * wide_1LV.norm()


def test_weights_that_tensor_parallelism_splits_are_marked() -> None:
    """Megatron's gradient norm counts an unmarked weight once per tensor group."""
    parameters = dict(ours_of(hf_model(tied=False)).named_parameters())
    marked = {
        name for name, parameter in parameters.items() if getattr(parameter, "tensor_model_parallel", False)
    }
    assert marked == {name for name, parameter in parameters.items() if parameter.ndim == 2}


@torch.no_grad()
def test_int32_inputs_are_taken() -> None:
    ours, row = ours_of(hf_model(tied=True)), random_row(2)
    tokens_1L = tokens_of(row)
    wide_1LV = gpt.logits(ours, tokens_1L, row.positions_1L, row.layout_KL)
    assert torch.equal(wide_1LV, gpt.logits(ours, tokens_1L.int(), row.positions_1L.int(), row.layout_KL))


def test_rotary_angles_are_those_of_transformers() -> None:
    config = hf_model(tied=True).config
    positions_1L = torch.tensor([[0, 1, 2, 1, 2, 3, 4095, 77]])
    cos_1LR, sin_1LR = Qwen3RotaryEmbedding(config)(torch.zeros(1), positions_1L)
    angles_LR = PositionRotary(ModelConfig.from_hf(config.to_dict()))(positions_1L)[:, 0, 0]
    assert torch.equal(angles_LR.cos(), cos_1LR[0]) and torch.equal(angles_LR.sin(), sin_1LR[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    config = transformer_config(ModelConfig.from_hf(hf_model(tied=True).config.to_dict()), dtype)
    ours, theirs = RMSNorm(config, 48, eps=1e-6), Qwen3RMSNorm(48, eps=1e-6).to(dtype)
    generator = torch.Generator().manual_seed(0)
    x_TBC, grad_TBC = (torch.randn(7, 1, 48, generator=generator).to(dtype) for _ in range(2))
    assert torch.equal(ours(x_TBC), theirs(x_TBC))
    assert ours.weight.sequence_parallel is False
    for norm in (ours, theirs):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    computed, expected = (
        torch.autograd.grad(norm(x_TBC.requires_grad_()), (x_TBC, norm.weight), grad_TBC)
        for norm in (ours, theirs)
    )
    for one, other in zip(computed, expected, strict=True):
        # A few roundings of numbers up to 10; in bfloat16 transformers' backward rounds in other places.
        assert (one - other).abs().max() <= (1e-6 if dtype == torch.float32 else 2**-7) * other.abs().max()
