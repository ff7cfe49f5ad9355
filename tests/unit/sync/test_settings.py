"""Settings that cannot work are refused where they are read."""

import pytest

from megatron_parallel_r1.sync.settings import Sync


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"transport": "disk"}, "transport disk needs a folder"),
        ({"bucket_bytes": 0}, "bucket_bytes must be >= 1"),
        ({"tolerance": 0.0}, "tolerance must be > 0"),
        ({"keep": 0, "timeout_s": 0}, "timeout_s must be >= 1; keep must be >= 1"),
    ],
)
def test_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sync(**given)
