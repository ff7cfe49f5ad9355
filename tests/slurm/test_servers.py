"""Trainers on one node, a rollout server on the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import LaunchSettings
from megatron_parallel_r1.rollout.launcher.run import find_python
from tests.slurm.jobs import ONE_NODE, RECIPE, Site

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.engines]

# A stock engine samples a summary after all paths, as one text.
WORDS = (
    *("thinking.mode=replay", "stages.cold_start.steps=4", "stages.cold_start.evaluate=false"),
    *("stages.rl.steps=2", "stages.rl.evaluate=false", "rollout.engine=sglang", "rollout.urls_file=later"),
)


def test_a_node_serves_what_the_other_trains(site: Site) -> None:
    try:
        find_python(LaunchSettings(checkpoint=Path("any"), engine="sglang"))
    except UserError as error:
        pytest.skip(str(error))
    words = (str(RECIPE), *WORDS, f"out={site.folder}/runs")
    site.finish(site.submit("sft_stage.sh", *words, header=ONE_NODE))
    servers = {"ROLLOUT_NODES": "1", "ROLLOUT_SERVERS": "1", "ROLLOUT_WAIT_S": "550"}
    job = site.submit("rl_stage.sh", *words, **servers, TORCHDYNAMO_DISABLE="0")  # SGLang needs it
    site.finish(job)
    logs = site.logs(job) / "attempt0"
    assert (logs / "rank_0.log").is_file() and not (logs / "rank_1.log").exists()
    assert (logs / "urls").read_text().startswith("http://n2:")
    metrics = (site.folder / "runs/mini/rl/metrics.jsonl").read_text().splitlines()
    # float32: server and trainer agree on the log-probs.
    assert [json.loads(line)["mismatch_max"] <= 2e-5 for line in metrics] == [True, True]
    site.assert_no_process_left()
