"""The settings of CUDA's allocator for memory that other processes open."""

from __future__ import annotations

import pytest
import torch

from megatron_parallel_r1.utils.devices import keep_memory_shareable


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({}, []),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, []),
        (
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"},
            ["max_split_size_mb:64,expandable_segments:False"],
        ),
        # torch reads the older name first.
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": ""}, []),
    ],
)
def test_shared_memory_has_no_expandable_segments(
    environment: dict[str, str], settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # The name that torch has for it, with its own type.
    assert callable(torch._C._accelerator_setAllocatorSettings)
    found: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append)
    keep_memory_shareable()
    assert found == settings
