"""Extra states of layers are kept with a checkpoint and come back.

Megatron's own layers are made to have them here, as those of Transformer Engine do; the code of the real ones
runs in tests/unit/model/test_layers.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.train.checkpoints.folder import Checkpoints
from megatron_parallel_r1.train.checkpoints.sharded import EXTRA, TRUST, extra_states
from megatron_parallel_r1.train.trainer import Trainer


@pytest.fixture(autouse=True)
def remembering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Column-parallel layers may have a history, as bytes."""

    def get(layer: ColumnParallelLinear) -> torch.Tensor | None:
        return getattr(layer, "history", None)

    def set_(layer: ColumnParallelLinear, state: torch.Tensor) -> None:
        assert os.environ[TRUST] == "1"
        layer.history = state

    monkeypatch.setattr(ColumnParallelLinear, "get_extra_state", get)
    monkeypatch.setattr(ColumnParallelLinear, "set_extra_state", set_)


def layers(trainer: Trainer) -> Iterator[tuple[str, ColumnParallelLinear]]:
    for stage in trainer.model:
        for name, layer in stage.named_modules():
            if isinstance(layer, ColumnParallelLinear) and "decoder" in name:
                yield name, layer


def give_histories(trainer: Trainer) -> dict[str, list[int]]:
    for number, (_, layer) in enumerate(layers(trainer)):
        layer.history = torch.arange(number, 3 * number + 5, dtype=torch.uint8)
    return histories(trainer)


def histories(trainer: Trainer) -> dict[str, list[int]]:
    return {name: layer.history.tolist() for name, layer in layers(trainer) if hasattr(layer, "history")}


def test_histories_come_back(trainer_of, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    trainer, fresh = trainer_of(), trainer_of(seed=5)
    histories_before = give_histories(trainer)
    assert len(histories_before) == len(extra_states(trainer.model)) == 4
    checkpoints.save(trainer, 1, {})
    # What is saved is what was there then.
    for _, layer in layers(trainer):
        layer.history.fill_(0)
    assert checkpoints.restore(fresh) == (1, {})
    assert histories(fresh) == histories_before
    assert TRUST not in os.environ


def test_layers_without_history_leave_no_file(trainer_of, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    trainer, fresh = trainer_of(), trainer_of(seed=5)
    for _, layer in layers(trainer):
        layer.history = torch.empty(0, dtype=torch.uint8)  # As before the first step.
    checkpoints.save(trainer, 1, {})
    checkpoints.restore(fresh)
    assert not histories(fresh) and not list(tmp_path.rglob(EXTRA))


def test_a_flipped_byte_is_found_before_the_bytes_are_read(trainer_of, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    trainer, fresh = trainer_of(), trainer_of(seed=5)
    give_histories(trainer)
    checkpoints.save(trainer, 1, {})
    checkpoints.settle()
    (file,) = tmp_path.rglob(EXTRA)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{EXTRA} has other bytes than were written"):
        checkpoints.restore(fresh)
    assert not histories(fresh)
