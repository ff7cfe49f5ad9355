"""Jobs that SLURM stops, each in its own way and side by side; each ends like an undisturbed one."""

from __future__ import annotations

import json
import signal

import pytest

from tests.curriculum.test_run import steps_of
from tests.slurm.jobs import ONE_NODE, RECIPE, REPOSITORY, SHORT, Site, assert_equal

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def test_preempted_jobs_and_one_of_a_hung_node_end_like_an_undisturbed_one(site: Site) -> None:
    """The job that preempts them is the undisturbed one."""
    unsignalled = site.folder / "curriculum.sh"
    text = (REPOSITORY / "slurm/curriculum.sh").read_text()
    unsignalled.write_text("".join(line for line in text.splitlines(True) if "--signal" not in line))

    def submit(name: str, *header: str, script: str = "curriculum.sh", hold: str = "") -> str:
        short = (*SHORT, "stages.rl.steps=4", "stages.rl.save_every=1", "stages.rl.evaluate=false")
        words = (str(RECIPE), *short, f"out={site.folder}/{name}")
        return site.submit(script, *words, header=(*ONE_NODE, "--oversubscribe", *header), HOLD=hold)

    jobs = {
        # SIGKILL soon follows SIGTERM.
        "at_once": submit("at_once", "--nodelist=n1", hold="end"),
        # The signal of --signal to the script (preempt_send_user_signal), and 600 s.
        "signalled": submit("signalled", "--nodelist=n1", "--partition=graced", hold="stop"),
        # Without --signal: SIGTERM to the ranks, and 600 s.
        "terminated": submit(
            "terminated", "--nodelist=n1", "--partition=graced", script=str(unsignalled), hold="stop"
        ),
        "hung": submit("hung", "--exclude=n1", hold="stop"),
    }
    runs = {name: site.folder / name / "mini" for name in (*jobs, "undisturbed")}
    for name, job in jobs.items():
        site.wait(job, lambda run=runs[name]: steps_of(run / "rl") == [1, 2])
        site.wait(job, lambda run=runs[name]: (run / "rl/checkpoints/step_000001").is_dir())

    hung = site.node_of(jobs["hung"])
    rank = site.rank(jobs["hung"], 0)
    site.slurm.hang_node(hung)
    rank.send_signal(signal.SIGUSR1)  # once awake, it finishes its step and would save it
    undisturbed = submit("undisturbed", "--nodelist=n1", "--partition=urgent", "--cpus-per-task=4")
    site.wait(jobs["hung"], lambda: len(steps_of(runs["hung"] / "rl")) > 2)
    site.slurm.wake_node(hung)
    rank.wait()

    site.finish(undisturbed)
    for name, job in jobs.items():
        site.finish(job)
        attempts = json.loads((site.logs(job) / "attempts.json").read_text())
        outcomes = [attempt["outcome"] for attempt in attempts]
        if name == "hung":  # srun of the node that woke may end the new attempt's step, whose id is the same
            assert outcomes in (["failed", "done"], ["failed", "failed", "done"]), attempts
        else:
            assert outcomes == ["stopped", "done"], (name, attempts)
        assert steps_of(runs[name] / "rl") == [1, 2, 3, 4]
        assert_equal(runs[name], runs["undisturbed"])
        assert ("stopped after 7 steps, saved; requeued" in site.output(job)) == (
            name in ("signalled", "terminated")
        )
    assert "the one before was stopped (ended by SLURM: preempted" in site.output(jobs["at_once"])
