"""What a heartbeat monitor concludes: who is silent, who is elsewhere, and whose error it was."""

import pytest
import torch.distributed as dist

from megatron_parallel_r1.distributed.heartbeat import (
    Heartbeat,
    HeartbeatMonitor,
    first_line,
    is_collective_error,
)
from megatron_parallel_r1.distributed.watchdog import Watchdog


def packed(count: int, location: str = "step 1", state: str = "here") -> bytes:
    return Heartbeat(count, location, "read (data.py:7)", state).pack().encode()


def test_silence_counts_from_the_last_change_by_the_monitors_clock() -> None:
    monitor = HeartbeatMonitor(range(3), now=100.0)
    monitor.update([packed(1), packed(1), b""], now=101.0)
    monitor.update([packed(2), packed(1), b""], now=109.0)
    assert monitor.describe_silent(now=109.0, timeout_s=9.5) is None
    message = monitor.describe_silent(now=109.0, timeout_s=8.0)
    assert message == (
        "rank 1 has sent no heartbeat for 8 s, it was last in step 1; "
        "rank 2 has sent no heartbeat for 9 s, it was last in its start"
    )
    assert monitor.present(now=109.0, timeout_s=8.0) == [0]


def test_a_rank_that_has_left_is_not_silent() -> None:
    monitor = HeartbeatMonitor(range(2), now=0.0)
    monitor.update([packed(1, state="left"), packed(1)], now=1.0)
    assert monitor.left() == [0] and monitor.describe_silent(now=50.0, timeout_s=60.0) is None
    assert "rank 0" not in monitor.describe_silent(now=90.0, timeout_s=60.0)


def test_when_all_are_alive_the_ranks_whose_collective_did_not_fail_are_named() -> None:
    monitor = HeartbeatMonitor(range(3), now=0.0)
    monitor.update(
        [packed(1, "step 17", "doubts"), packed(1, "step 16"), packed(1, "step 17", "doubts")], now=1.0
    )
    assert monitor.explain_failure("D") == "D; every rank is alive, rank 1 is in step 16, at read (data.py:7)"
    monitor.update(
        [packed(2, "step 17", "doubts"), packed(2, "step 16", "left"), packed(2, "step 17")], now=2.0
    )
    assert monitor.explain_failure("D") == "D: rank 1 has left already, from step 16"


def test_a_message_names_four_ranks_and_counts_the_others() -> None:
    message = HeartbeatMonitor(range(512), now=0.0).describe_silent(now=60.0, timeout_s=60.0)
    assert message.count("has sent no heartbeat") == 4 and message.endswith("; and 508 more")


def test_an_error_of_torch_distributed_is_recognized() -> None:
    gloo = RuntimeError("[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:9.\nmore")
    assert is_collective_error(gloo) and is_collective_error(dist.DistNetworkError("reset"))
    assert not is_collective_error(RuntimeError("size mismatch")) and not is_collective_error(
        OSError("/gloo/")
    )
    assert first_line(gloo) == "Connection closed by peer [::1]:9."
    assert first_line(ValueError()) == "ValueError"


def test_a_time_out_shorter_than_a_few_heartbeats_is_refused() -> None:
    with pytest.raises(ValueError, match="must be 5 s or more"):
        Watchdog(0, 2, timeout_s=4)
