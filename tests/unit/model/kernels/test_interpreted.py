"""The Triton kernels equal attention's definition, as far as Triton's interpreter can tell without a GPU."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.slow

# Sums of a few hundred float32 products, each rounded to 2^-24; ten of them apart at worst.
FLOAT32 = 2e-6
# Weights, gradients of scores and results are bfloat16, 2^-8 apart, and the interpreter cuts where a GPU
# rounds: three errors of one sign that add up to less than 2^-6 of the largest number.
BFLOAT16 = 2**-6


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What interpreted.py says; one process, which has the interpreter."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.unit.model.kernels.interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def errors(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By case and by result."""
    return results["cases"]


@pytest.mark.parametrize("layout", ["causal", "packed", "nested", "replay", "isolated"])
def test_output_and_gradients_are_the_definition(errors: dict[str, dict[str, float]], layout: str) -> None:
    chosen = {name: found for name, found in errors.items() if name.startswith(layout)}
    assert {name.rpartition("/")[2] for name in chosen} == {"float32", "bfloat16"}
    for name, found in chosen.items():
        assert set(found) == {"out", "lse", "query_grad", "key_grad", "value_grad"}
        limit = FLOAT32 if name.endswith("float32") else BFLOAT16
        assert max(found.values()) < limit, f"{name}: {found}"
        # Sums of exponentials stay float32 in either case.
        assert found["lse"] < FLOAT32, f"{name}: {found}"


@pytest.mark.parametrize("kind", ["/cp2/", "/cp4/", "/busy/", "/strided/", "/6:2x", "x128/", "x80/", "x8/"])
def test_context_parallel_parts_strides_shared_heads_and_head_sizes_are_among_the_cases(
    errors: dict[str, dict[str, float]], kind: str
) -> None:
    assert any(kind in name for name in errors)


def test_the_model_calls_them_by_name(results: dict[str, Any]) -> None:
    assert results["chosen"] < FLOAT32
