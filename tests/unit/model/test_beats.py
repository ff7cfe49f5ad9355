"""What follows from beats: who is silent, who is somewhere else, and whose error it was."""

import pytest
import torch.distributed as dist

from megatron_parallel_r1.distributed.heartbeat import Beat, Heard, failed_collective, first_line
from megatron_parallel_r1.distributed.watchdog import Watch


def packed(count: int, place: str = "step 1", state: str = "here") -> bytes:
    return Beat(count, place, "read (data.py:7)", state).pack().encode()


def test_silence_counts_from_the_last_change_by_the_readers_clock() -> None:
    heard = Heard(range(3), now=100.0)
    heard.hear([packed(1), packed(1), b""], now=101.0)
    heard.hear([packed(2), packed(1), b""], now=109.0)
    assert heard.silent(now=109.0, patience=9.5) is None
    said = heard.silent(now=109.0, patience=8.0)
    assert said == (
        "rank 1 has not been heard of for 8 s, it was last in step 1; "
        "rank 2 has not been heard of for 9 s, it was last in its start"
    )
    assert heard.present(now=109.0, patience=8.0) == [0]


def test_a_rank_that_said_farewell_is_not_silent() -> None:
    heard = Heard(range(2), now=0.0)
    heard.hear([packed(1, state="left"), packed(1)], now=1.0)
    assert heard.left() == [0] and heard.silent(now=50.0, patience=60.0) is None
    assert "rank 0" not in heard.silent(now=90.0, patience=60.0)


def test_when_all_are_alive_those_whose_collective_did_not_fail_are_named() -> None:
    heard = Heard(range(3), now=0.0)
    heard.hear(
        [packed(1, "step 17", "doubts"), packed(1, "step 16"), packed(1, "step 17", "doubts")], now=1.0
    )
    assert heard.astray("D") == "D; every rank is alive, rank 1 is in step 16, at read (data.py:7)"
    heard.hear([packed(2, "step 17", "doubts"), packed(2, "step 16", "left"), packed(2, "step 17")], now=2.0)
    assert heard.astray("D") == "D: rank 1 has left already, from step 16"


def test_a_line_names_four_ranks_and_counts_the_others() -> None:
    said = Heard(range(512), now=0.0).silent(now=60.0, patience=60.0)
    assert said.count("has not been heard of") == 4 and said.endswith("; and 508 more")


def test_an_error_of_torch_distributed_is_told_from_others() -> None:
    gloo = RuntimeError("[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:9.\nmore")
    assert failed_collective(gloo) and failed_collective(dist.DistNetworkError("reset"))
    assert not failed_collective(RuntimeError("size mismatch")) and not failed_collective(OSError("/gloo/"))
    assert first_line(gloo) == "Connection closed by peer [::1]:9."
    assert first_line(ValueError()) == "ValueError"


def test_a_time_out_shorter_than_a_few_beats_is_refused() -> None:
    with pytest.raises(ValueError, match="must be 5 s or more"):
        Watch(0, 2, timeout_s=4)
