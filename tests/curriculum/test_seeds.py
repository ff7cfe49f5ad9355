from __future__ import annotations

from megatron_parallel_r1.report.evaluation_table import seed_table


def record(stage: str, accuracy: float, length: float) -> dict[str, object]:
    return {"stage": stage, "mode": "isolated", "accuracy": accuracy, "critical_length": 10, "length": length}


def test_seed_table_by_hand() -> None:
    table = seed_table(
        {
            1: [record("base", 0.4, 30), record("rl", 0.8, 60)],
            2: [record("base", 0.5, 32), record("rl", 0.9, 70)],
        }
    )
    assert table.splitlines()[2:] == [
        "| base | isolated | 40.0% | 50.0% | 45.0% ± 7.1% | 10.0 | 31.0 |",
        "| rl | isolated | 80.0% | 90.0% | 85.0% ± 7.1% | 10.0 | 65.0 |",
    ]
