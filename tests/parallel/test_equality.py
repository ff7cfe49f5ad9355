"""A parallel layout changes nothing but speed: three optimizer steps against one process, by torchrun.

Each layout goes through SFT and GRPO with recompute off, full and selective, the sharded optimizer, and
bfloat16, on packed `isolated` and `replay` rows of different lengths; and through whole steps of the
`Learner`, with old and reference log-probs, mini-batches, a KL penalty, masks and per-path credit. The
layouts of as many processes share a launch. Expert parallelism has a model of its own, and fewer variants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from tests.parallel.launch import MODELS, torchrun

RELATIVE = 1e-5  # float32 sums in another order
# bfloat16 rounds at 2^-9, and a split model rounds partial sums that one process never sees: four such units
# for the first step. Updated weights, rounded in turn, feed them back, and Adam turns a small difference of a
# small gradient into a step. A loss of advantages of both signs nearly cancels: relative to 1 at least.
RELATIVE_BFLOAT16 = (2**-7, 2**-6, 2**-5)

Figures = dict[str, Any]
Launched = Callable[[int], dict[str, dict[str, Figures]]]

# The quick tier has `test_resume`, whose steps under another layout are compared with one process too.
pytestmark = pytest.mark.slow
LAYOUTS = [
    (1, ""),
    (1, "untied"),
    (2, "tensor=2 sequence untied"),
    (2, "pipeline=2 virtual=2"),
    (2, "context=2"),
    (2, ""),
    (2, "tensor=2"),
    (2, "pipeline=2"),
    (2, "pipeline=2 untied"),
    (4, "tensor=2 pipeline=2"),
    (4, "tensor=2 pipeline=2 virtual=2 sequence"),
    (4, "tensor=2"),
    (4, "pipeline=2"),
    (4, "context=2"),
    (4, "tensor=2 context=2 sequence"),
    (4, "pipeline=4 untied"),
    (2, "experts expert=2"),
    (4, "experts expert=2"),
    (4, "experts expert=4"),
    (4, "experts expert=2 tensor=2 sequence"),
    (4, "experts expert=2 pipeline=2"),
    (4, "experts expert=2 context=2"),
    (8, "tensor=2 pipeline=2"),
    (8, "tensor=2 pipeline=2 virtual=2 context=2"),
]


@pytest.fixture(scope="module")
def launched(selected: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """What one launch of so many processes found, by layout; it goes through all that are to be tested."""

    @cache
    def launch(processes: int) -> dict[str, dict[str, Figures]]:
        # One process is what all that is selected is compared with.
        layouts = [case["layout"] for case in selected if case["processes"] == processes]
        if processes == 1:
            layouts = sorted({one_process(case.get("layout", "")) for case in selected})
        out = tmp_path_factory.mktemp("launched") / "found.pt"
        torchrun(processes, "steps", out, *layouts)
        return torch.load(out)

    return launch


def one_process(layout: str) -> str:
    return " ".join(word for word in layout.split() if word in MODELS)


def scale(name: str, value: float) -> float:
    """What a figure's difference is relative to: itself, unless it is a mean of e^d - 1 - d, d being the
    difference of two log-probs.

    There a rounding of log-probs counts times d, whose size is about the root of twice the mean.
    """
    return math.sqrt(2 * abs(value)) if name in ("kl", "kl_old") else abs(value)


def differences(expected: Figures, found: Figures, floor: float) -> list[float]:
    """The largest relative difference of each step; that of the weights (as vectors) counts with the last."""
    assert expected.keys() == found.keys()
    worst = [
        max(
            abs(expected[name][step] - found[name][step]) / max(scale(name, expected[name][step]), floor)
            for name in expected.keys() - {"weights"}
        )
        for step in range(3)
    ]
    ours, theirs = found["weights"], expected["weights"]
    assert ours.keys() == theirs.keys()
    apart = max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)
    return [*worst[:2], max(worst[2], apart)]


def test_the_lessons_meet_bounds_masks_and_the_reference(launched: Launched) -> None:
    for model, figures in launched(1).items():
        if "experts" in model:
            norms, plain = (figures[f"{name}, recompute none"]["grad_norm"] for name in ("balanced", "grpo"))
            assert abs(norms[0] - plain[0]) > 100 * RELATIVE * plain[0]
            continue
        lesson = figures["kl in the reward, recompute none"]
        assert min(lesson["masked"]) > 0 and max(lesson["clip_fraction"]) > 0
        assert min(figures["path credit, recompute none"]["kl"]) > 0


@pytest.mark.parametrize(("processes", "layout"), LAYOUTS)
def test_equals_one_process(launched: Launched, processes: int, layout: str) -> None:
    expected = launched(1)[one_process(layout)]
    for variant, figures in launched(processes)[layout].items():
        loss = variant.split(",")[0]
        if "bfloat16" in variant:
            reference, allowed, floor = expected[variant], RELATIVE_BFLOAT16, 1.0
        else:
            reference, allowed, floor = expected[f"{loss}, recompute none"], (RELATIVE,) * 3, 1e-3
        if reference is figures:
            continue
        assert reference.get("targets") == figures.get("targets")
        worst = differences(reference, figures, floor)
        shown = " ".join(f"{value:.1e}" for value in worst)
        print(f"{processes} processes {layout or 'data parallel'} | {variant} | {shown}")
        assert all(value <= bound for value, bound in zip(worst, allowed, strict=True)), (variant, worst)
