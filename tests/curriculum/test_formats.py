"""A whole run in another format: SFT, RL, evaluation, report and release."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_parallel_r1.data.tokenizers import open_thinking_tokenizer
from megatron_parallel_r1.thought.formats import NPR
from tests.curriculum.test_run import RECIPE, run


def test_a_run_in_the_format_of_npr(tmp_path: Path) -> None:
    words = ["thinking.format=npr", "thinking.max_response_tokens=200", "thinking.max_path_tokens=16"]
    words += [
        "stages.rl.steps=2",
        "stages.rl.epochs=1",
        "stages.rl.mini_batches=1",
        "max_tokens_per_micro_batch=1024",
    ]
    run(tmp_path, "curriculum", str(RECIPE), *words)
    folder = tmp_path / "mini"
    metrics = [json.loads(line) for line in (folder / "rl/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in metrics if "mismatch_max" in record]
    assert len(steps) == 2 and all(record["mismatch_max"] <= 2e-5 for record in steps)
    assert json.loads((folder / "release/thinking.json").read_text())["format"] == "npr"
    _, tags = open_thinking_tokenizer(folder / "release")
    assert tags.format == NPR and "`<guideline>` blocks" in (folder / "release/README.md").read_text()
    assert (folder / "report.html").is_file()
