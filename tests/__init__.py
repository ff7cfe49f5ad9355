"""Processes that tests launch import this first, so that Megatron-Core is imported lightly in them too."""

from megatron_parallel_r1.utils.imports import prepare_imports

prepare_imports()
