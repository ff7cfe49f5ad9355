"""The benchmarks that need a GPU, run tiny on a CPU lest they rot, and what they say without one."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import run
from benchmarks.gpu.rows import dense_mask, timed_rows, visible_pairs
from benchmarks.gpu.sizes import TINY
from benchmarks.gpu.tables import Table, replace_section
from benchmarks.gpu.tune import candidates


@pytest.mark.slow
def test_every_measurement_runs(world: None) -> None:
    tables = {table.title.split(",")[0]: table for table in run.tables(TINY, torch.device("cpu"))}
    assert len(tables) == 6
    for table in tables.values():
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
        assert table.markdown().startswith(f"### {table.title}")
    (from_transformers,) = tables["Largest difference of logits from transformers'"].rows
    assert float(from_transformers[1]) <= 2e-5  # the promise of the design
    exact, rounded = tables["Difference of a token's log-prob at rollout and in training"].rows
    assert float(exact[2]) <= 2e-5 < float(rounded[2])
    errors = tables["Largest error by the largest number"].rows[0]
    assert errors[:2] == ["tiled", "float32"]
    assert max(map(float, errors[2:])) < 2e-6  # float32 sums of a few hundred products
    by_kernel = {tuple(row[:3]): row for row in tables["A training step of 1 layers of 32"].rows}
    assert float(by_kernel["local", "tiled", "none"][3]) > 0
    assert "needs a CUDA device" in by_kernel["transformer_engine", "auto", "current"][5]


def test_without_cuda_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert run.main(["--document", str(tmp_path / "performance.md")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_visible_pairs_are_those_of_the_mask() -> None:
    for packed in timed_rows(640).values():
        assert visible_pairs(packed.layout_KL) == dense_mask(torch.from_numpy(packed.layout_KL)).sum()


def test_rows_have_the_tokens_that_they_are_named_for() -> None:
    lengths = {name: len(packed) for name, packed in timed_rows(1024).items()}
    assert lengths.pop("replay") > 1024
    assert set(lengths.values()) == {1024}


def test_a_section_is_replaced_in_place(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text("# Performance\n\nBefore.\n")
    replace_section(document, "first")
    document.write_text(document.read_text() + "\nAfter.\n")
    replace_section(document, Table("second", ["a"], [["1"]]).markdown())
    text = document.read_text()
    assert text.index("Before.") < text.index("### second") < text.index("After.") and "first" not in text


def test_tiles_are_tried_one_kernel_at_a_time() -> None:
    (_, present), *others = candidates(TINY)
    kernels = ("forward", "query_gradient", "key_gradient")
    for kernel, chosen in others:
        assert [name for name in kernels if getattr(chosen, name) != getattr(present, name)] == [kernel]
