"""The real-data recipe, shortened: every part runs on the published files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.curriculum.test_run import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_sft_and_grpo_run_on_published_files(tmp_path: Path, real_data: Path) -> None:
    run(
        tmp_path,
        "curriculum",
        str(ROOT / "recipes/tiny/real_data.yaml"),
        f"stages.cold_start.data.path={real_data}/parallel_gsm8k.parquet",
        f"tokenizer.texts.0.path={real_data}/parallel_gsm8k.parquet",
        f"stages.rl.data.path={real_data}/gsm8k_train.parquet",
        "stages.cold_start.steps=12",
        "stages.rl.steps=1",
        "thinking.max_response_tokens=128",
    )
    folder = tmp_path / "real_data"
    losses = [
        json.loads(line)["loss"] for line in (folder / "cold_start/metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0]
    (step,) = [json.loads(line) for line in (folder / "rl/metrics.jsonl").read_text().splitlines()]
    assert step["mismatch_max"] <= 2e-5
    assert (folder / "release/model.safetensors").is_file()
