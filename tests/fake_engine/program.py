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
from megatron_parallel_r1.train.micro_batch import MicroBatch, partition_rows
from megatron_parallel_r1.train.trainer import Adam, Trainer
from tests.fake_engine.children import in_children
from tests.parallel.steps import batch_of_rows
from tests.reference import fp8

# Sizes of each rank's parts are multiples of 16, also over two ranks.
SHAPE = ModelConfig(hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=41, rope_theta=1e3)
SCALINGS = ("delayed", "current", "blockwise")
BF16 = Layers("transformer_engine")
LR = 1e-3
ROWS = 8


def fp8_layers(scaling: str, **others: Any) -> Layers:
    return Layers("transformer_engine", fp8=scaling, **others)


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


def trainer_of(layers: Layers, parallel: ParallelConfig | None = None) -> tuple[Trainer, list[MicroBatch]]:
    """A fresh trainer and its micro-batches; forgets the layers of former ones."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    parallel = parallel or ParallelConfig(sharded_optimizer=layers.fp8_params)
    model = build_model(SHAPE, torch.bfloat16, parallel, layers)
    load_hf_tensors(model, random_hf_tensors(SHAPE, seed=7, std=0.2))
    adam = Adam(lr=LR, eps=1e-6, weight_decay=0.1, clip=0.0, sharded=parallel.sharded_optimizer)
    trainer = Trainer(model, adam)
    rows = batch_of_rows()[0][:ROWS]
    tokens = sum(map(len, rows)) * 2 // 3
    own = partition_rows(rows, tokens - tokens % 32, trainer.partition)
    return trainer, [MicroBatch.of(row, trainer.device) for row in own]


def train(trainer: Trainer, batches: list[MicroBatch], steps: int) -> list[float]:
    return [
        trainer.update(batches, lambda logprobs_N, *_: (-logprobs_N.sum(), {}), LR).loss for _ in range(steps)
    ]


def weights_of(model: Model) -> dict[str, Tensor]:
    return {name: weight.float().clone() for name, weight in hf_tensors(model)}


def histories(model: Model) -> list[Tensor]:
    """Scales and histories of delayed scaling, of all layers."""
    return [
        tensor.clone()
        for layer in model.modules()
        if hasattr(layer, "fp8_meta")
        for way in ("scaling_fwd", "scaling_bwd")
        if hasattr(layer.fp8_meta.get(way), "scale")
        for tensor in (layer.fp8_meta[way].scale, layer.fp8_meta[way].amax_history)
    ]


def gradients(trainer: Trainer) -> Tensor:
    """All gradients of the last update."""
    return torch.cat([p.main_grad.flatten() for p in trainer.model.parameters()])


@cache
def in_bfloat16() -> tuple[list[float], Tensor, list[Tensor], float]:
    """Losses of three steps in bfloat16, the first gradient, log-probs before it, and the size of logits."""
    trainer, batches = trainer_of(BF16)
    before = trainer.logprobs(batches)
    with torch.no_grad():
        batch = batches[0]
        found_1LV = logits(trainer.model, batch.tokens_1L, batch.positions_1L, batch.layout_KL).float()
    losses = train(trainer, batches, 1)
    first = gradients(trainer).clone()
    losses += train(trainer, batches, 2)
    return losses, first, before, found_1LV.std(-1).square().mean().sqrt().item()


def apart(found: Tensor, right: Tensor) -> float:
    """The norm of the difference relative to the norm of `right`."""
    return ((found - right).norm() / right.norm()).item()


def steps(scaling: str, fp8_params: bool) -> dict[str, Any]:
    """Three steps in FP8 beside those in bfloat16 from the same weights."""
    losses, gradient, before, size = in_bfloat16()
    trainer, batches = trainer_of(fp8_layers(scaling, fp8_params=fp8_params))
    if scaling == "delayed":
        train_nothing(trainer, batches)  # the first scales
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


def train_nothing(trainer: Trainer, batches: list[MicroBatch]) -> None:
    """A step of learning rate 0."""
    trainer.update(batches, lambda logprobs_N, *_: (-logprobs_N.sum(), {}), 0.0)


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


def resumed(scaling: str, fp8_params: bool) -> dict[str, bool]:
    """Whether a trainer restored after two of four steps ends as one that was not interrupted."""
    layers = fp8_layers(scaling, fp8_params=fp8_params)
    whole, batches = trainer_of(layers)
    losses = train(whole, batches, 4)
    right = (weights_of(whole.model), histories(whole.model))
    with tempfile.TemporaryDirectory() as folder:
        trainer, batches = trainer_of(layers)
        train(trainer, batches, 2)
        checkpoints = Checkpoints(Path(folder))
        checkpoints.save(trainer, 2, {})
        checkpoints.settle()
        other, batches = trainer_of(layers)
        Checkpoints(Path(folder)).restore(other)
    after = train(other, batches, 2)
    found = (weights_of(other.model), histories(other.model))
    return {
        "losses": after == losses[2:],
        "weights": all(torch.equal(found[0][name], value) for name, value in right[0].items()),
        "histories": len(found[1]) == len(right[1]) and all(map(torch.equal, found[1], right[1])),
    }


def probed(scaling: str) -> dict[str, bool]:
    """Whether the probe's log-probs are those in bfloat16, and a checkpoint after it keeps the histories."""
    texts = probe_texts(SHAPE.vocab)
    plain, _ = trainer_of(BF16)
    right = causal_logprobs(plain, texts, 256)
    trainer, batches = trainer_of(fp8_layers(scaling))
    train_nothing(trainer, batches)
    before = (set(extra_states(trainer.model)), histories(trainer.model))
    found = causal_logprobs(trainer, texts, 256)
    after = (set(extra_states(trainer.model)), histories(trainer.model))
    same = before[0] == after[0] and all(map(torch.equal, before[1], after[1]))
    return {"equal": found == right, "kept": same and len(after[0]) == 12 * (scaling == "delayed")}


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


def over_ranks(layout: dict[str, Any], scalings: tuple[str, ...]) -> dict[str, Any]:
    """Losses of three steps, final weights and histories under a parallel layout."""
    torch.set_num_threads(1)
    found = {}
    parallel = ParallelConfig(**layout)
    with process.running(1, parallel):
        for scaling in scalings:
            trainer, batches = trainer_of(fp8_layers(scaling), parallel)
            losses = train(trainer, batches, 3)
            found[scaling] = {
                "losses": losses,
                "weights": {name: value.numpy() for name, value in weights_of(trainer.model).items()},
                # Of each layer's [input, weight, output]: what the next step scales weights by.
                "weight_scales": [
                    layer.fp8_meta["scaling_fwd"].scale[1].item()
                    for layer in trainer.model.modules()
                    if getattr(layer, "fp8_meta", {}).get("num_gemms") and scaling == "delayed"
                ],
            }
    return found


def split(layout: dict[str, Any]) -> dict[str, Any]:
    """How far two tensor-parallel ranks end from one process."""
    (whole,) = in_children(1, over_ranks, {}, SCALINGS)
    first, second = in_children(2, over_ranks, {"tensor": 2, **layout}, SCALINGS)
    result = {}
    for scaling in SCALINGS:
        right, ours = whole[scaling], first[scaling]
        flat = [
            torch.cat([torch.from_numpy(run["weights"][name]).flatten() for name in right["weights"]])
            for run in (ours, right)
        ]
        result[scaling] = {
            "losses": ours["losses"],
            "right": right["losses"],
            "weights_apart": apart(*flat),
            # Adam moves no weight further in a step than by the learning rate.
            "weights_apart_at_most": 2 * 3 * LR * len(flat[1]) ** 0.5 / flat[1].norm().item(),
            "same_scales": first[scaling]["weight_scales"] == second[scaling]["weight_scales"],
            "scales": ours["weight_scales"],
            "right_scales": right["weight_scales"],
        }
    return result


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
    measured: dict[str, Any] = {"split": split({}), "split_sequence": split({"sequence": True})}
    for scaling in SCALINGS:
        in_children(1, curriculum, str(folder / scaling), [f"model.fp8={scaling}"])
    with process.running(1):
        measured["beside_local_layers"] = beside_local_layers()
        measured["products"] = {scaling: products(scaling) for scaling in SCALINGS}
        for kept in (False, True):
            for scaling in SCALINGS:
                name = f"{scaling}, matrices in FP8" if kept else scaling
                measured.setdefault("steps", {})[name] = steps(scaling, kept)
                measured.setdefault("resumed", {})[name] = resumed(scaling, kept)
        measured["probed"] = {scaling: probed(scaling) for scaling in ("delayed", "current")}
        for scaling in ("current", "blockwise"):
            measured.setdefault("fresh_weights", {})[scaling] = fresh_weights(scaling)
            measured.setdefault("first_and_last", {})[scaling] = first_and_last(scaling)
    (folder / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
