"""Jobs that fail, and how often they are requeued."""

from __future__ import annotations

import pytest

from tests.curriculum.test_run import steps_of
from tests.slurm.jobs import FAILING, ONE_NODE, RECIPE, REPOSITORY, RUN, SHORT, Site

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def test_a_dead_rank_ends_the_job_and_its_last_lines_are_shown(site: Site) -> None:
    job = site.submit("curriculum.sh", *RUN, f"out={site.folder}/runs", MAX_FAILURES="1", HOLD="end")
    site.wait_for_steps(job, [1, 2])
    site.rank(job, 1).kill()
    assert site.wait(job) == "FAILED"
    output = site.output(job)
    assert "rank 1 on n2 was ended by a signal: Killed; its last lines" in output
    assert "crash loop: 1 failures" in output
    site.assert_no_process_left()


def test_a_crash_loop_is_given_up(site: Site) -> None:
    words = (str(RECIPE), *SHORT, FAILING, f"out={site.folder}/runs")
    job = site.submit("curriculum.sh", *words, header=ONE_NODE, MAX_FAILURES="2")
    assert site.wait(job) == "FAILED"
    output = site.output(job)
    assert "failed after 6 steps; requeued" in output
    assert "deliberate failure in the third step" in output  # the last lines of the rank's log
    assert "crash loop: 2 failures without progress beyond" in output


def test_a_step_longer_than_the_grace_time_is_cut_off(site: Site) -> None:
    words = (str(RECIPE), *SHORT, "stages.rl.steps=4", "stages.rl.save_every=1", f"out={site.folder}/runs")
    job = site.submit("curriculum.sh", *words, header=ONE_NODE, GRACE_S="2", HOLD="end")
    rl = site.folder / "runs/mini/rl"
    site.wait_for_steps(job, [1, 2])
    site.wait(job, lambda: (rl / "checkpoints/step_000001").is_dir())
    site.slurm.client("scancel", "--signal=USR1", "--batch", job)
    site.finish(job)
    assert "not saved within 2 s; requeued unsaved" in site.output(job)
    assert steps_of(rl) == [1, 2, 3, 4]


def test_lost_servers_are_started_anew(site: Site) -> None:
    words = (str(RECIPE), *SHORT, f"out={site.folder}/runs", "thinking.mode=replay", "rollout.patience_s=1")
    site.finish(site.submit("sft_stage.sh", *words, header=ONE_NODE))
    engine = {"ROLLOUT_PYTHON": "tests/slurm/standins/engine", "ROLLOUT_SERVERS": "1"}
    job = site.submit("rl_stage.sh", *words, ROLLOUT_NODES="1", MAX_FAILURES="2", **engine)
    assert site.wait(job) == "FAILED"
    output = site.output(job)
    assert "failed after 0 steps; requeued" in output
    # The last lines of both attempts; and the reason with which the job is given up.
    assert output.count("\n    error: no rollout server usable for") == 2
    assert "crash loop: 2 failures" in output and "exit code 75: error: no rollout server usable" in output
    assert (site.logs(job) / "attempt1/urls").is_file()
    site.assert_no_process_left()


def test_a_node_that_failed_twice_is_left_out_of_the_next_attempt(site: Site) -> None:
    """The bookkeeping's verdict is written by the job itself; no rank starts."""
    script = site.folder / "failing.sh"
    script.write_text(
        "#!/bin/bash\nset -euo pipefail\nsource slurm/common.sh\n"
        "bookkeeping() {\n"
        '[[ $ATTEMPT == 0 ]] || return 0\necho "$SLURMD_NODENAME" >"$JOB_LOGS/bad_nodes"\nreturn 75\n}\n'
        "conclude rank 1\n"
    )
    header = (*ONE_NODE, "--requeue", "--open-mode=append", "--exclude=n3")
    job = site.submit(str(script), header=header, REPOSITORY=str(REPOSITORY))
    site.finish(job)
    bad = (site.logs(job) / "bad_nodes").read_text().strip()
    assert {bad, site.node_of(job)} == {"n1", "n2"}
    assert f"failed twice on {bad}: left out of the next attempt" in site.output(job)
