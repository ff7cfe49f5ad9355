"""What rank 0 sends to the others when its work fails."""

from __future__ import annotations

import pickle

from megatron_parallel_r1.distributed.collectives import _sendable
from megatron_parallel_r1.errors import UserError


class Unsendable(Exception):
    def __init__(self, row: int, column: int) -> None:
        super().__init__(f"row {row}, column {column}")


def test_an_error_that_pickle_cannot_copy_keeps_its_text() -> None:
    error = UserError("reward: no such column")
    assert _sendable(error) is error
    sent = pickle.loads(pickle.dumps(_sendable(Unsendable(3, 4))))
    assert isinstance(sent, RuntimeError) and str(sent) == "Unsendable: row 3, column 4"
