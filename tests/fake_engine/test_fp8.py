"""FP8 training by Transformer Engine's real Python over the fake of its library, which computes on the CPU.

One process measures everything (program.py); to import takes it longest. What is shown: how the Python casts,
scales, saves and reduces. Not shown: the library's kernels.

Rounding to nearest is off by at most u of a number, 2^-4 for e4m3 and 2^-3 for e5m2, and by u / sqrt(3) in
the root mean square at most (evenly spread over half a step, for the smallest mantissa). Errors of different
products are independent, so their squares add.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fake_engine.layouts import CASES

ROOT = Path(__file__).resolve().parents[2]
SOURCE = os.environ.get("TRANSFORMER_ENGINE_SOURCE")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCE, reason="Transformer Engine is not unpacked at TRANSFORMER_ENGINE_SOURCE"),
]
SCALINGS = ("delayed", "current", "blockwise")
VARIANTS = [*SCALINGS, *(f"{scaling}, matrices in FP8" for scaling in SCALINGS)]
WITH_EXPERTS = [f"{scaling}, experts" for scaling in SCALINGS]
E4M3, E5M2 = 2.0**-4 / math.sqrt(3), 2.0**-3 / math.sqrt(3)
# Of program.py: qkv, projection and two of the MLP in each layer.
LAYERS, PRODUCTS, ROWS = 3, 4, 8


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fp8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_engine", "tests.fake_engine.program", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "measured.json").read_text())


def forward_error() -> float:
    """The relative error (root mean square) of the last layer's output: each product casts two operands."""
    return math.sqrt(PRODUCTS * LAYERS * 2) * E4M3


def gradient_error(scaling: str) -> float:
    """That of gradients: the forward pass's, and of as many products backward with a cast gradient."""
    of_gradient = E4M3 if scaling.startswith("blockwise") else E5M2
    return math.hypot(forward_error(), math.sqrt(PRODUCTS * LAYERS * (E4M3**2 + of_gradient**2)))


def logprob_error(found: dict[str, Any]) -> float:
    """That of a log-prob, in nats: two logits', that of the token and the sum's; rows are independent."""
    return math.sqrt(2) * forward_error() * found["logits"]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_products_are_those_of_the_definition(measured: dict[str, Any], scaling: str) -> None:
    # In units of the rounding of the result to bfloat16.
    assert max(measured["products"][scaling].values()) <= 1.0


@pytest.mark.parametrize("variant", [*VARIANTS, *WITH_EXPERTS])
def test_loss_and_gradients_are_as_far_from_bfloat16_as_the_mantissa_explains(
    measured: dict[str, Any], variant: str
) -> None:
    found = measured["steps"][variant]
    assert E4M3 / 4 < found["gradient_apart"] < gradient_error(variant)
    assert found["logprobs_apart"] < logprob_error(found)
    for loss, right in zip(found["losses"], found["right"], strict=True):
        assert abs(loss - right) < logprob_error(found) / math.sqrt(ROWS)
    assert found["losses"][2] < found["losses"][0]


@pytest.mark.parametrize("variant", [*VARIANTS, "delayed, experts"])
def test_a_resumed_run_is_the_uninterrupted_one(measured: dict[str, Any], variant: str) -> None:
    """Bit for bit, with the histories of delayed scaling."""
    assert measured["resumed"][variant] == {"losses": True, "weights": True, "histories": True}


def test_matrices_are_kept_in_fp8(measured: dict[str, Any]) -> None:
    kept = [measured["steps"][variant]["matrices"] for variant in VARIANTS]
    assert kept == [["Tensor"]] * 3 + [["Float8Tensor"], ["Float8Tensor"], ["Float8BlockwiseQTensor"]]


@pytest.mark.parametrize("layout", [name for name in CASES if "pipeline" not in name])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_two_tensor_or_context_parallel_ranks_train_as_one_process(
    measured: dict[str, Any], scaling: str, layout: str
) -> None:
    """A rank's scales are those of its own part (with delayed scaling of the whole), so casts differ; no more
    is apart than FP8 is from bfloat16."""
    found = measured["beside_one_process"][layout][scaling]
    model = f"{scaling}, experts" if "experts" in layout else scaling
    for loss, right in zip(found["losses"], found["right"], strict=True):
        assert abs(loss - right) < logprob_error(measured["steps"][model]) / math.sqrt(ROWS)
    assert found["weights_apart"] < found["weights_apart_at_most"]
    first, second = found["scales"]
    assert first == second and len(first) == len(found["right_scales"])
    assert bool(first) == (scaling == "delayed")


@pytest.mark.parametrize("layout", [name for name in CASES if "pipeline" not in name])
def test_the_largest_numbers_of_all_ranks_make_the_scales(measured: dict[str, Any], layout: str) -> None:
    """Weights' scales are those of whole matrices, as in one process."""
    found = measured["beside_one_process"][layout]["delayed"]
    assert found["scales"][0] == pytest.approx(found["right_scales"], rel=0.01)


@pytest.mark.parametrize("layout", [name for name in CASES if "pipeline" in name])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_two_pipeline_ranks_are_one_process(measured: dict[str, Any], scaling: str, layout: str) -> None:
    """Bit for bit: a stage's products and histories are its own."""
    found = measured["beside_one_process"][layout][scaling]
    assert found["losses"] == found["right"] and found["weights_apart"] == 0.0
    first, second = found["scales"]
    assert first + second == found["right_scales"]


@pytest.mark.parametrize("variant", [*SCALINGS, *WITH_EXPERTS])
def test_recomputation_changes_nothing(measured: dict[str, Any], variant: str) -> None:
    """Bit for bit: the second forward pass scales as the first did, and adds no number to the histories."""
    assert measured["recomputed"][variant] == {"full": True, "selective": True}


def test_log_probs_after_an_update_are_of_its_weights(measured: dict[str, Any]) -> None:
    assert measured["fresh_weights"] == {"current": True, "blockwise": True}


def test_the_probe_of_servers_computes_in_bfloat16(measured: dict[str, Any]) -> None:
    """FP8's rounding would hide a wrong weight; and the histories are not lost to the next checkpoint."""
    assert measured["probed"] == {
        variant: {"equal": True, "kept": True} for variant in ("delayed", "current", "delayed, experts")
    }


def test_its_layers_have_the_weights_and_checkpoint_keys_of_ours(measured: dict[str, Any]) -> None:
    found = measured["beside_local_layers"]
    assert found.pop("layers") == ["TELayerNormColumnParallelLinear"]
    assert all(found.values()), found


def test_first_and_last_layers_stay_in_bfloat16(measured: dict[str, Any]) -> None:
    for found in measured["first_and_last"].values():
        assert found == {"fp8": [False, True, False], "exempt_equal": True}
