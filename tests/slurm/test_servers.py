"""Trainers on one node, a rollout server on the other; or both on each node."""

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


COLOCATED = (
    *("rollout.servers=1", "rollout.colocated=true", "rollout.sync.transport=tensor"),
    *("rollout.patience_s=600", "thinking.mode=replay", "rollout.engine=sglang", "evaluation=null"),
    *("stages.cold_start.steps=2", "stages.cold_start.evaluate=false"),
    *("stages.rl.steps=2", "stages.rl.evaluate=false"),
)


@pytest.fixture(autouse=True)
def _engine() -> None:
    try:
        find_python(LaunchSettings(checkpoint=Path("any"), engine="sglang"))
    except UserError as error:
        pytest.skip(str(error))


def test_each_node_serves_what_it_trains_also_after_a_requeue_in_the_hand_over(site: Site) -> None:
    words = (str(RECIPE), *COLOCATED, f"out={site.folder}/runs")
    job = site.submit("curriculum.sh", *words, TORCHDYNAMO_DISABLE="0")  # SGLang needs it
    run = site.folder / "runs/mini"
    log = run / "servers/n1/server-0.log"
    site.wait(job, lambda: log.is_file() and "POST /release_memory_occupation" in log.read_text())
    # The server sleeps, and the trainer takes its memory back.
    site.slurm.client("scontrol", "requeue", job)
    site.finish(job)
    attempts = json.loads((site.logs(job) / "attempts.json").read_text())
    assert len(attempts) == 2 and attempts[-1]["outcome"] == "done", attempts
    steps = [json.loads(line) for line in (run / "rl/metrics.jsonl").read_text().splitlines()]
    for step in steps:
        assert step["mismatch_max"] <= 2e-5 and step["sync_difference"] <= 2e-5 and step["servers_up"] == 2
    for node in ("n1", "n2"):
        log = (run / f"servers/{node}/server-0.log").read_text()
        taken = log.count('"POST /update_weights_from_tensor HTTP/1.1" 200')
        # Once a step; a step that was cut off is repeated.
        assert len(steps) == 2 <= taken <= 3, (node, taken)
        assert log.count('"POST /generate HTTP/1.1" 200') > 12, node  # more than probes and handshakes
        assert '"POST /release_memory_occupation HTTP/1.1" 200' in log, node
    site.assert_no_process_left()


def test_a_node_serves_what_the_other_trains(site: Site) -> None:
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
