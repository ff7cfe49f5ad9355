"""The benchmarks that need a GPU, run tiny on a CPU lest they rot, and what they say without one."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import run
from benchmarks.gpu.attention import Timed
from benchmarks.gpu.clock import Cost
from benchmarks.gpu.rows import dense_mask, timed_rows, visible_pairs
from benchmarks.gpu.sizes import TINY, Sizes
from benchmarks.gpu.targets import targets
from benchmarks.gpu.tune import candidates
from benchmarks.page import Table


@pytest.mark.slow
def test_every_measurement_runs(world: None) -> None:
    tables = {table.title.split(",")[0]: table for table in run.tables(TINY, torch.device("cpu"))}
    assert len(tables) == 7 and not any(map(run.is_wrong, tables.values()))
    for table in tables.values():
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
        assert table.markdown().startswith(f"### {table.title}")
    logits = {
        tuple(row[:4]): row[4:] for row in tables["Difference of logits from transformers' in float32"].rows
    }
    for kernel in ("sdpa", "tiled"):
        assert float(logits["local", kernel, "none", "float32"][0]) <= 2e-5  # the promise of the design
    # Ours is rounded as often as theirs.
    ours = float(logits["local", "auto", "none", "bfloat16"][1])
    theirs = float(logits["transformers'", "eager", "none", "bfloat16"][1])
    assert 0 < ours < 2 * theirs
    exact, rounded = tables["Difference of a token's log-prob at rollout and in training"].rows
    assert float(exact[2]) <= 2e-5 < float(rounded[2])
    errors = tables["Largest relative error"].rows[0]
    assert errors[:2] == ["sdpa", "float32"]
    assert max(map(float, errors[2:6])) < 2e-6  # float32 sums of a few hundred products
    by_kernel = {tuple(row[:4]): row for row in tables["A training step of 1 layers of 32"].rows}
    assert float(by_kernel["local", "tiled", "none", "bfloat16"][4]) > 0
    for matrices in ("fp8", "bfloat16"):
        assert "needs a CUDA device" in by_kernel["transformer_engine", "auto", "current", matrices][8]


def test_a_measurement_that_fails_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(sizes: Sizes, device: torch.device) -> list[Table]:
        raise RuntimeError("out of | memory")

    right, wrong = (Table("found", ["right"], [[word]]) for word in ("yes", "NO"))
    measures = {"first": fails, "second": lambda sizes, device: [right, wrong]}
    monkeypatch.setattr(run, "MEASURES", measures)
    failed, *others = run.tables(TINY, torch.device("cpu"), list(measures))
    assert others == [right, wrong]
    assert failed.rows == [["RuntimeError: out of / memory"]]
    assert [run.is_wrong(table) for table in (failed, right, wrong)] == [True, False, True]
    assert "Traceback" in capsys.readouterr().err


def timed(tokens: int, row: str, share: float, ms: float, mib: float) -> Timed:
    """FlashAttention takes 10 ms, and 30 with backward; SDPA under a dense mask five times as much."""
    both = (Cost(ms, 0), Cost(3 * ms, mib))
    return Timed(tokens, row, "triton", share, both, (Cost(10, 0), Cost(30, 0)), (Cost(50, 0), Cost(150, 0)))


def test_targets_name_the_worst_row() -> None:
    found = [
        timed(8192, "causal", 1.0, 12.5, 100),
        timed(8192, "isolated", 0.5, 6.0, 100),
        timed(16384, "causal", 1.0, 11.0, 230),
        timed(16384, "isolated", 0.5, 8.0, 200),
    ]
    assert targets(found).rows == [
        ["of the bound by visible pairs, forward", ">= 0.75", "0.62", "isolated, 16384", "no"],
        ["of the bound by visible pairs, forward+backward", ">= 0.65", "0.62", "isolated, 16384", "no"],
        ["times dense-mask SDPA at 16384, forward", ">= 4", "6.25", "isolated, 16384", "yes"],
        ["times dense-mask SDPA at 16384, forward+backward", ">= 4", "6.25", "isolated, 16384", "yes"],
        ["memory per token, relative to 8192 tokens", "<= 1.1", "1.15", "causal, 16384", "no"],
    ]


def test_without_cuda_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert run.main(["--page", str(tmp_path / "performance.md")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_visible_pairs_are_those_of_the_mask() -> None:
    for packed in timed_rows(640).values():
        assert visible_pairs(packed.layout_KL) == dense_mask(torch.from_numpy(packed.layout_KL)).sum()


def test_rows_have_the_tokens_that_they_are_named_for() -> None:
    lengths = {name: len(packed) for name, packed in timed_rows(1024).items()}
    assert lengths.pop("replay") > 1024
    assert set(lengths.values()) == {1024}


def test_tiles_are_tried_one_kernel_at_a_time() -> None:
    (_, present), *others = candidates(TINY)
    kernels = ("forward", "query_gradient", "key_gradient")
    for kernel, chosen in others:
        assert [name for name in kernels if getattr(chosen, name) != getattr(present, name)] == [kernel]
