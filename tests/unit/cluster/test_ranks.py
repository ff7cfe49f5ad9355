"""Local ranks, and a stop request that arrives when some have ended."""

from __future__ import annotations

import time

from megatron_parallel_r1.cluster.job import LocalRanks, exit_code


def test_a_stop_request_tolerates_ranks_that_have_ended() -> None:
    ranks = LocalRanks(("--help",), 2)
    while None in [exit_code(process) for process in ranks._processes]:
        time.sleep(0.05)
    ranks.request_stop()
    assert ranks.wait() == 0
    ranks.kill()
    assert ranks.wait() == 0
