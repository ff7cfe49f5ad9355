"""Trains tiny models with layers of Transformer Engine over the fake library; test_fp8.py judges the figures.

python -m tests.fake_engine tests.fake_engine.program FOLDER

FOLDER/measured.json has what each function here returns.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.model.gpt import Model, build_model, logits
from megatron_parallel_r1.model.layers import Layers
from megatron_parallel_r1.model.transformer import transformer_config
from megatron_parallel_r1.model.weights import hf_tensors, load_hf_tensors, own_parameters, random_hf_tensors
from megatron_parallel_r1.train.checkpoints.folder import Checkpoints
from megatron_parallel_r1.train.checkpoints.sharded import extra_states
from megatron_parallel_r1.train.logprob_runner import causal_logprobs, probe_texts
from tests.fake_engine.children import in_children
from tests.fake_engine.layouts import beside_one_process
from tests.fake_engine.models import (
    BF16,
    EXPERTS,
    SCALINGS,
    SHAPE,
    apart,
    fp8_layers,
    gradients,
    histories,
    train,
    trainer_of,
    weights_of,
)
from tests.reference import fp8


def products(scaling: str) -> dict[str, float]:
    """The largest error of a linear layer's output and gradients in units of bfloat16's rounding of them.

    Two steps, so that the second one's delayed scales are those of the first one's largest numbers.
    """
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.pytorch import Linear, autocast

    recipe = get_fp8_recipe(transformer_config(SHAPE, torch.bfloat16, layers=fp8_layers(scaling)))
    generator = torch.Generator().manual_seed(2)
    layer = Linear(160, 144, bias=False, params_dtype=torch.bfloat16, device="cpu")
    weight_OI = layer.weight.detach()
    scales: tuple[float, ...] = (1.0, 1.0, 1.0) if scaling == "delayed" else ()
    dtypes = (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e5m2)
    worst = dict.fromkeys(("out_TO", "x_grad_TI", "weight_grad_OI"), 0.0)
    for size in (1.0, 3.0):
        x_TI = (torch.randn(272, 160, generator=generator) * size).bfloat16().requires_grad_()
        grad_TO = (torch.randn(272, 144, generator=generator) * size).bfloat16()
        layer.zero_grad()
        with autocast(enabled=True, recipe=recipe):
            out_TO = layer(x_TI)
        out_TO.backward(grad_TO)
        expected = fp8.linear(x_TI.detach(), weight_OI, grad_TO, scaling, scales)
        found = (out_TO.detach(), x_TI.grad, layer.weight.grad)
        for (name, value), right in zip(worst.items(), vars(expected).values(), strict=True):
            ours = found[list(worst).index(name)].float()
            # Half an ulp of 8 significant bits, and float32's sums in another order.
            unit = right.abs() * 2.0**-8 + right.abs().max() * 1e-5
            worst[name] = max(value, ((ours - right).abs() / unit).max().item())
        if scaling == "delayed":
            operands = (x_TI.detach(), weight_OI, grad_TO)
            scales = tuple(
                fp8.scale_of(operand.abs().max().item(), dtype, powers_of_two=False)
                for operand, dtype in zip(operands, dtypes, strict=True)
            )
    return worst


@cache
def in_bfloat16(shape: ModelConfig = SHAPE) -> tuple[list[float], Tensor, list[Tensor], float]:
    """Losses of three steps in bfloat16, the first gradient, log-probs before it, and the size of logits."""
    trainer, batches = trainer_of(BF16, shape=shape, routed_by_place=True)
    before = trainer.logprobs(batches)
    with torch.no_grad():
        batch = batches[0]
        found_1LV = logits(trainer.model, batch.tokens_1L, batch.positions_1L, batch.layout_KL).float()
    losses = train(trainer, batches, 1)
    first = gradients(trainer).clone()
    losses += train(trainer, batches, 2)
    return losses, first, before, found_1LV.std(-1).square().mean().sqrt().item()


def steps(scaling: str, fp8_params: bool, shape: ModelConfig) -> dict[str, Any]:
    """Three steps in FP8 beside those in bfloat16 from the same weights."""
    losses, gradient, before, size = in_bfloat16(shape)
    layers = fp8_layers(scaling, fp8_params=fp8_params)
    trainer, batches = trainer_of(layers, shape=shape, routed_by_place=True)
    if scaling == "delayed":
        train(trainer, batches, 1, lr=0.0)  # the first scales
    found_before = trainer.logprobs(batches)
    found = train(trainer, batches, 1)
    gradient_apart = apart(gradients(trainer), gradient)
    found += train(trainer, batches, 2)
    return {
        "losses": found,
        "right": losses,
        "logprobs_apart": (torch.cat(found_before) - torch.cat(before)).square().mean().sqrt().item(),
        "gradient_apart": gradient_apart,
        "logits": size,
        "matrices": matrices(trainer.model),
    }


def matrices(model: Model) -> list[str]:
    """Classes of the layers' matrices."""
    return sorted(
        {type(p.data).__name__ for n, p in own_parameters(model).items() if p.dim() == 2 and ".layers." in n}
    )


def fresh_weights(scaling: str) -> bool:
    """Whether log-probs after an update are those of another model with the same weights: no layer computes
    with a cast of older weights."""
    trainer, batches = trainer_of(fp8_layers(scaling))
    train(trainer, batches, 2)
    found = trainer.logprobs(batches)
    other, _ = trainer_of(fp8_layers(scaling))
    load_hf_tensors(other.model, dict(hf_tensors(trainer.model)))
    return all(map(torch.equal, found, other.logprobs(batches)))


def resumed(scaling: str, fp8_params: bool, shape: ModelConfig = SHAPE) -> dict[str, bool]:
    """Whether a trainer restored after two of four steps ends as one that was not interrupted."""
    layers = fp8_layers(scaling, fp8_params=fp8_params)
    whole, batches = trainer_of(layers, shape=shape)
    losses = train(whole, batches, 4)
    right = (weights_of(whole.model), histories(whole.model))
    with tempfile.TemporaryDirectory() as folder:
        trainer, batches = trainer_of(layers, shape=shape)
        train(trainer, batches, 2)
        checkpoints = Checkpoints(Path(folder))
        checkpoints.save(trainer, 2, {})
        checkpoints.settle()
        other, batches = trainer_of(layers, shape=shape)
        Checkpoints(Path(folder)).restore(other)
    after = train(other, batches, 2)
    found = (weights_of(other.model), histories(other.model))
    return {
        "losses": after == losses[2:],
        "weights": all(torch.equal(found[0][name], value) for name, value in right[0].items()),
        "histories": len(found[1]) == len(right[1]) and all(map(torch.equal, found[1], right[1])),
    }


def recomputed(scaling: str, shape: ModelConfig) -> dict[str, bool]:
    """Whether two steps under each way of recomputation end as without: losses, weights, and delayed
    scaling's scales and largest numbers. (A history has more rows: each recomputed layer adds one of zeros.)
    """

    def end(recompute: str) -> tuple[list[float], list[Tensor]]:
        trainer, batches = trainer_of(
            fp8_layers(scaling), ParallelConfig(recompute=recompute), replace(shape, layers=2)
        )
        losses = train(trainer, batches, 2)
        model = trainer.model
        kept = [tensor.amax(0) if tensor.dim() == 2 else tensor for tensor in histories(model)]
        return losses, [*weights_of(model).values(), *kept]

    losses, tensors = end("none")
    found = {way: end(way) for way in ("full", "selective")}
    return {
        way: ours[0] == losses and len(ours[1]) == len(tensors) and all(map(torch.equal, ours[1], tensors))
        for way, ours in found.items()
    }


def probed(scaling: str, shape: ModelConfig) -> dict[str, bool]:
    """Whether the probe's log-probs are those in bfloat16, and a checkpoint after it keeps the histories."""
    texts = probe_texts(shape.vocab)
    plain, _ = trainer_of(BF16, shape=shape)
    right = causal_logprobs(plain, texts, 256)
    trainer, batches = trainer_of(fp8_layers(scaling), shape=shape)
    train(trainer, batches, 1, lr=0.0)
    before = (set(extra_states(trainer.model)), histories(trainer.model))
    found = causal_logprobs(trainer, texts, 256)
    after = (set(extra_states(trainer.model)), histories(trainer.model))
    same = before[0] == after[0] and all(map(torch.equal, before[1], after[1]))
    # qkv and projection, and two of each expert or the MLP.
    layers = shape.layers * (2 + 2 * (shape.experts.count if shape.experts else 1))
    return {"equal": found == right, "kept": same and len(after[0]) == layers * (scaling == "delayed")}


def beside_local_layers() -> dict[str, Any]:
    """How a model with such layers compares with one of Megatron's own."""
    local, engine = (build_model(SHAPE, torch.bfloat16, layers=layers) for layers in (Layers(), BF16))
    for model in (local, engine):
        load_hf_tensors(model, random_hf_tensors(SHAPE, 1))
    pairs = zip(hf_tensors(local), hf_tensors(engine), strict=True)
    saved = [
        {
            entry.key: tuple(entry.data.shape)
            for entry in model[0].sharded_state_dict(metadata={"non_homogeneous_layers": True}).values()
            if not entry.key.endswith("_extra_state")
        }
        for model in (local, engine)
    ]
    return {
        "layers": sorted(
            {type(layer.self_attention.linear_qkv).__name__ for layer in engine[0].decoder.layers}
        ),
        "same_names": set(own_parameters(local)) == set(own_parameters(engine)),
        "same_tensors": all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs),
        "same_checkpoint": saved[0] == saved[1],
        "no_histories_yet": not extra_states(engine),
    }


def first_and_last(scaling: str) -> dict[str, Any]:
    """Which layers' products were in FP8; and whether a model whose layers all are exempt is bfloat16's."""
    trainer, batches = trainer_of(fp8_layers(scaling, bf16_first=1, bf16_last=1))
    train(trainer, batches, 1)
    found = [layer.mlp.linear_fc1.fp8 for layer in trainer.model[0].decoder.layers]
    trainer, batches = trainer_of(fp8_layers(scaling, bf16_first=3))
    return {"fp8": found, "exempt_equal": train(trainer, batches, 3) == in_bfloat16()[0]}


def curriculum(folder: str, settings: list[str]) -> None:
    """The whole command on the recipe of tests/curriculum, with three steps of SFT and two of RL."""
    sys.argv = [
        *("parallel-r1", "curriculum", "tests/curriculum/mini.yaml", "stages.cold_start.steps=3"),
        *("stages.rl.steps=2", "evaluation.problems=8", "model.dtype=bfloat16"),
        *("model.layers=transformer_engine", f"out={folder}", *settings),
    ]
    try:
        runpy.run_module("megatron_parallel_r1.cli", run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"exit code {ended.code}") from None


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    measured: dict[str, Any] = {"beside_one_process": beside_one_process()}
    for scaling, recompute in zip(SCALINGS, ("none", "full", "selective"), strict=True):
        settings = [f"model.fp8={scaling}", f"parallel.recompute={recompute}"]
        in_children(1, curriculum, str(folder / scaling), settings)
    with process.running(1):
        measured["beside_local_layers"] = beside_local_layers()
        measured["products"] = {scaling: products(scaling) for scaling in SCALINGS}
        for scaling in SCALINGS:
            for kept in (False, True):
                name = f"{scaling}, matrices in FP8" if kept else scaling
                measured.setdefault("steps", {})[name] = steps(scaling, kept, SHAPE)
                measured.setdefault("resumed", {})[name] = resumed(scaling, kept)
            name = f"{scaling}, experts"
            measured["steps"][name] = steps(scaling, False, EXPERTS)
            measured["recomputed"] = measured.get("recomputed", {}) | {
                scaling: recomputed(scaling, SHAPE),
                name: recomputed(scaling, EXPERTS),
            }
        measured["resumed"]["delayed, experts"] = resumed("delayed", True, EXPERTS)
        measured["probed"] = {
            "delayed": probed("delayed", SHAPE),
            "current": probed("current", SHAPE),
            "delayed, experts": probed("delayed", EXPERTS),
        }
        for scaling in ("current", "blockwise"):
            measured.setdefault("fresh_weights", {})[scaling] = fresh_weights(scaling)
            measured.setdefault("first_and_last", {})[scaling] = first_and_last(scaling)
    (folder / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
