"""The benchmark of masks runs, tiny, and its dense mask is the layout's."""

from pathlib import Path

import pytest
import torch

from benchmarks import mask_cost
from benchmarks.gpu.rows import dense_mask, timed_rows
from benchmarks.real_traces import additive_mask


def test_its_tables_are_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask_cost.main(
        [
            *("--data", str(tmp_path / "absent.parquet"), "--lengths", "512", "1024", "--dense", "600"),
            *("--attention", "256", "--repeats", "1"),
        ]
    )
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    making, attending = lines[2:4], lines[6:]
    assert making[0].count("–") == 0 and making[1].count("–") == 3
    assert [line.split(" | ")[1] for line in attending] == [
        "one causal trace",
        "one trace, 2 x 4 paths",
        "one trace, 1 x 8 paths",
        "real traces, packed",
    ]
    shares = [float(line.split(" | ")[2]) for line in attending]
    assert shares[0] == 1 and all(0 < share < 1 for share in shares[1:])


def test_the_dense_mask_is_that_of_the_layout() -> None:
    for packed in timed_rows(512).values():
        layout_KL = torch.from_numpy(packed.layout_KL)
        assert torch.equal(additive_mask(layout_KL)[0, 0] == 0, dense_mask(layout_KL))
