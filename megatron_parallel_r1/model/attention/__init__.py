"""Attention under a layout: one interface (choice.py), a file for each way to compute it."""

from megatron_parallel_r1.model.attention.choice import Kernel, check_kernel, path_attention
from megatron_parallel_r1.model.attention.core import PathAttention

__all__ = ["Kernel", "PathAttention", "check_kernel", "path_attention"]
