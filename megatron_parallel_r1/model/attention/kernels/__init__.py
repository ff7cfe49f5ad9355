"""Triton kernels of attention under a layout. Importing them needs Triton; see launch.py."""
