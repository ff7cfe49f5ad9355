"""Settings that cannot work are refused where they are read."""

import pytest

from megatron_parallel_r1.sync.settings import Sync


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"transport": "disk"}, "transport disk needs a folder"),
        ({"bucket_bytes": 0}, r"bucket_bytes\n.*greater than or equal to 1"),
        ({"tolerance": 0.0}, r"tolerance\n.*greater than 0"),
        (
            {"keep": 0, "timeout_s": 0},
            r"(?s)timeout_s\n.*greater than or equal to 1.*keep\n.*greater than or equal to 1",
        ),
    ],
)
def test_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sync(**values)
