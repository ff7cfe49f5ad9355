"""What layers may be made of, where; and that Transformer Engine's are called as it wants to be called.

Transformer Engine imports only where CUDA is, so its Python is read, not run: that of the installed package,
or of a wheel unpacked at TRANSFORMER_ENGINE_SOURCE (docs/kernels.md).
"""

import ast
import inspect
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.layers import (
    Layers,
    LayerSupport,
    check_balance,
    check_fp8,
    check_layers,
)
from megatron_parallel_r1.model.spec import block_spec
from megatron_parallel_r1.model.weights import FUSED, local_name, set_weight
from megatron_parallel_r1.train.checkpoints.sharded import TRUST

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
UNPACKED, INSTALLED = os.environ.get("TRANSFORMER_ENGINE_SOURCE"), find_spec("transformer_engine")
needs_engine = pytest.mark.skipif(
    not (UNPACKED or INSTALLED), reason="transformer-engine is neither installed nor unpacked"
)


def refusal(layers: Layers, machine: LayerSupport, dtype: torch.dtype = torch.bfloat16) -> str:
    with pytest.raises(UserError) as refused:
        check_layers(layers, 128, dtype, machine)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_cannot_run_is_told_in_one_line() -> None:
    engine, eight = Layers("transformer_engine"), Layers("transformer_engine", fp8="blockwise")
    assert "needs a CUDA device" in refusal(engine, LayerSupport(CPU))
    assert "is not installed" in refusal(engine, LayerSupport(CUDA))
    assert "2.3.0 is too old; install 2.4" in refusal(engine, LayerSupport(CUDA, "2.3.0"))
    message = refusal(engine, LayerSupport(CUDA, "2.4.0", "libcublas.so.12: cannot open shared object file"))
    assert "2.4.0 cannot be imported (libcublas.so.12: cannot open shared object file); install" in message
    assert "bfloat16" in refusal(eight, LayerSupport(CUDA, "2.20.2"), torch.float32)
    message = refusal(eight, LayerSupport(CUDA, "2.20.2", "", "compute capability 9.0 or higher required."))
    assert message == "model.fp8: blockwise: compute capability 9.0 or higher required; set it to none"
    for kernel in ("flex", "triton"):
        assert f"{kernel} needs a CUDA device" in refusal(Layers(attention=kernel), LayerSupport(CPU))
    assert "not one of auto, sdpa, tiled, flex, triton" in refusal(
        Layers(attention="dense"), LayerSupport(CUDA)
    )


def test_what_can_run_passes() -> None:
    for layers, machine in (
        (Layers(), LayerSupport(CPU)),
        (Layers("transformer_engine"), LayerSupport(CUDA, "2.4.0")),
        (Layers("transformer_engine", fp8="delayed", fp8_params=True), LayerSupport(CUDA, "2.20.2")),
    ):
        check_layers(layers, 128, torch.bfloat16, machine)


def test_fp8_asks_for_its_layers() -> None:
    with pytest.raises(UserError, match="only Transformer Engine has FP8"):
        Layers(fp8="current")
    with pytest.raises(UserError, match="needs scaling"):
        Layers("transformer_engine", fp8_params=True)
    for scaling in ("none", "delayed"):
        with pytest.raises(UserError, match=r"bf16_first_layers.*current or blockwise"):
            Layers("transformer_engine", fp8=scaling, bf16_last=1)


def test_fp8_needs_sizes_that_its_products_take() -> None:
    model = ModelConfig(hidden=64, layers=4, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=41)
    layers = Layers("transformer_engine", fp8="current", bf16_first=2)
    check_fp8(layers, model, tensor=2, pipeline=2)
    check_fp8(Layers(), replace(model, hidden=40), tensor=1, pipeline=1)
    check_balance(Layers(), model)
    with pytest.raises(UserError, match=r"model.balance_loss: the model has no experts; set it to 0"):
        check_balance(Layers(balance_loss=0.1), model)
    for changed, tensor, pipeline, message in (
        (model, 4, 1, r"ffn is 24 on each rank, and FP8 needs multiples of 16"),
        (replace(model, hidden=40), 1, 1, "hidden is 40"),
        (model, 1, 4, "bf16_first_layers: 2 is more than the 1 layers of a pipeline rank; set at most 1"),
    ):
        with pytest.raises(UserError, match=message):
            check_fp8(layers, changed, tensor, pipeline)


@pytest.mark.parametrize("scaling", ["delayed", "current", "blockwise"])
def test_megatron_takes_the_fields_of_each_scaling(scaling: str) -> None:
    layers = Layers("transformer_engine", fp8=scaling)
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, **layers.megatron_fields()
    )
    assert config.fp8_recipe == {"current": "tensorwise"}.get(scaling, scaling)
    assert config.fp8 == ("e4m3" if scaling == "blockwise" else "hybrid") and not config.fp8_param
    assert layers.row_multiple == 16 and Layers().row_multiple == 1


def test_fused_names_are_those_under_which_local_layers_are_checkpointed(world: None) -> None:
    """Megatron's local layers are saved under the names of Transformer Engine's; ours undo just that."""
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, qk_layernorm=True)
    (layer,) = block_spec(config, Layers()).layer_specs
    renamed = layer.submodules.sharded_state_dict_keys_map
    saved = {f"{theirs}weight": f"{ours}weight" for ours, theirs in renamed.items()}
    assert saved == FUSED
    assert local_name("mlp.linear_fc1.weight") == "mlp.linear_fc1.weight"


def test_a_matrix_that_remembers_its_birth_remembers_what_it_was_set_to() -> None:
    parameter, value = (
        torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)),
        torch.tensor([1 + 2**-20, 3.0]),
    )
    parameter._high_precision_init_val = torch.full((2,), 7.0)
    with torch.no_grad():
        set_weight(parameter, value)
    assert parameter.tolist() == [1.0, 3.0]
    assert torch.equal(parameter._high_precision_init_val, value)


@needs_engine
def test_it_is_told_by_the_name_that_it_knows_that_a_checkpoint_is_trusted() -> None:
    assert TRUST in ast.unparse(source("pytorch._extra_state"))


@needs_engine
def test_its_matrices_remember_by_the_name_that_we_know() -> None:
    assert "_high_precision_init_val" in ast.unparse(source("pytorch.module.base"))


def source(module: str) -> ast.Module:
    root = Path(UNPACKED or INSTALLED.submodule_search_locations[0])
    return ast.parse(Path(root, *module.split(".")).with_suffix(".py").read_text())


def arguments(module: str, name: str, method: str | None = None) -> set[str]:
    (found,) = (node for node in source(module).body if getattr(node, "name", None) == name)
    if method:
        (found,) = (node for node in found.body if getattr(node, "name", None) == method)
    return {argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)}


@needs_engine
def test_the_checks_that_we_call_exist() -> None:
    for name in ("is_fp8_available", "is_fp8_block_scaling_available"):
        assert arguments("pytorch.quantization", "FP8GlobalStateManager", name) == {"cls"}


def installed(monkeypatch: pytest.MonkeyPatch, support: ModuleType | None) -> None:
    """As on a machine with a GPU and Transformer Engine, of which `support` is the part that we ask; None: it
    cannot be imported."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("megatron_parallel_r1.model.layers.version", lambda name: "2.20.2")
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.fp8", support)


def test_the_machine_tells_what_transformer_engine_says_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeSupport:
        @classmethod
        def is_fp8_available(cls) -> tuple[bool, str]:
            return True, ""

        @classmethod
        def is_fp8_block_scaling_available(cls) -> tuple[bool, str]:
            return False, "requires CUDA 12.9"

    support = ModuleType("transformer_engine.pytorch.fp8")
    support.FP8GlobalStateManager = FakeSupport
    installed(monkeypatch, support)
    layers = {
        scaling: Layers("transformer_engine", fp8=scaling) for scaling in ("none", "current", "blockwise")
    }
    for scaling in ("none", "current"):
        assert LayerSupport.detect(layers[scaling]) == LayerSupport(CUDA, "2.20.2")
    assert LayerSupport.detect(layers["blockwise"]) == LayerSupport(CUDA, "2.20.2", "", "requires CUDA 12.9")


def test_an_installation_that_cannot_be_imported_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None)
    assert (
        "transformer_engine.pytorch.fp8" in LayerSupport.detect(Layers("transformer_engine")).engine_refusal
    )
    # Local layers never ask.
    assert LayerSupport.detect(Layers()) == LayerSupport(CUDA, "2.20.2")


@needs_engine
@pytest.mark.parametrize(
    ("wrapper", "module", "name"),
    [
        ("TELinear", "linear", "Linear"),
        ("TELayerNormColumnParallelLinear", "layernorm_linear", "LayerNormLinear"),
    ],
)
def test_its_layers_take_what_megatron_gives_them(wrapper: str, module: str, name: str) -> None:
    from megatron.core.extensions import transformer_engine as wrappers

    (tree,) = (
        node
        for node in ast.parse(inspect.getsource(wrappers)).body
        if isinstance(node, ast.ClassDef) and node.name == wrapper
    )
    keywords = {
        keyword.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__"
        for keyword in node.keywords
        if keyword.arg
    }
    assert keywords and keywords <= arguments(f"pytorch.module.{module}", name, "__init__")


@needs_engine
def test_its_recipes_and_contexts_take_what_megatron_gives_them() -> None:
    recipes = {node.name for node in source("common.recipe.__init__").body if isinstance(node, ast.ClassDef)}
    assert recipes >= {"DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling"}
    assert arguments("pytorch.quantization", "fp8_autocast") >= {"enabled", "fp8_recipe", "fp8_group"}
    keywords = {"enabled", "recipe", "preserve_high_precision_init_val"}
    assert arguments("pytorch.quantization", "fp8_model_init") >= keywords
    # Megatron-Core 0.16 imports from here; it is on its way out of Transformer Engine.
    imported = {
        name.name
        for node in ast.walk(source("pytorch.fp8"))
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert imported >= {"FP8GlobalStateManager", "fp8_autocast"}


@needs_engine
def test_a_fused_layer_names_its_norm_as_ours_undo() -> None:
    text = ast.unparse(source("pytorch.module.layernorm_linear"))
    assert "'layer_norm_weight'" in text
