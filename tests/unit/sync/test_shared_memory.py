"""Tensors in shared memory: another process reads them, and nothing is left behind."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.sync import publisher
from megatron_parallel_r1.sync.settings import Sync
from megatron_parallel_r1.sync.shared_memory import SHARED_MEMORY, shared

READER = """
import base64, pickle, sys
import torch
for line in sys.stdin:
    for name, tensor in pickle.loads(base64.b64decode(line)):
        print(name, tensor.dtype, tensor.tolist(), tensor.is_contiguous())
"""


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="there is no /dev/shm")
def test_another_process_reads_what_a_payload_names() -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = [
        ("part", whole[1:, :3].bfloat16()),
        ("turned", whole.T),
        ("whole", whole),
        ("one", whole[0, :1]),
    ]
    where = whole.data_ptr()
    with shared(tensors) as payload:
        texts = [payload(), payload()]
        whole.fill_(-1.0)
        content = base64.b64decode(texts[0])
        (file,) = (name for name in os.listdir(SHARED_MEMORY) if name.encode() in content)
        # Handles travel, not contents.
        assert len(content) < 1500
        done = subprocess.run(
            [sys.executable, "-c", READER],
            input="\n".join(texts),
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.stdout.splitlines() == 2 * [
        "part torch.bfloat16 [[4.0, 5.0, 6.0], [8.0, 9.0, 10.0]] True",
        "turned torch.float32 [[0.0, 4.0, 8.0], [1.0, 5.0, 9.0], [2.0, 6.0, 10.0], [3.0, 7.0, 11.0]] True",
        "whole torch.float32 [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]] True",
        "one torch.float32 [0.0] True",
    ], done.stderr
    assert whole.data_ptr() == where and not (SHARED_MEMORY / file).exists()


def test_without_shared_memory_the_transport_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "SHARED_MEMORY", tmp_path / "shm")
    with pytest.raises(UserError, match=r"sync.transport: tensor needs .*/shm; set broadcast or disk"):
        publisher._transport(torch.nn.Linear(1, 1), Sync(transport="tensor"))
