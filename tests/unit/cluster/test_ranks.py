"""The ranks of a run on this machine, and a stop that meets their ends."""

from __future__ import annotations

import time

from megatron_parallel_r1.cluster.local_ranks import LocalRanks, exit_code


def test_ranks_may_be_asked_to_stop_when_some_have_ended() -> None:
    ranks = LocalRanks(("--help",), 2)
    while None in [exit_code(process) for process in ranks._processes]:
        time.sleep(0.05)
    ranks.ask_to_stop()
    assert ranks.wait() == 0
    ranks.kill()
    assert ranks.wait() == 0
