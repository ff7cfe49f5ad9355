"""Attention under a layout: one interface (choice.py), a file for each way to compute it."""

from megatron_parallel_r1.model.attention.dispatch import Kernel, check_kernel, path_attention
from megatron_parallel_r1.model.attention.megatron_adapter import PathAttention

__all__ = ["Kernel", "PathAttention", "check_kernel", "path_attention"]
