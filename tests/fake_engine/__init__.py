"""Transformer Engine's real Python over a fake of its compiled library, which cannot be without CUDA.

The fake computes in torch on the CPU what the library's kernels are documented to compute: casts to FP8 by
torch's float8 types and Transformer Engine's rules of scaling (casts.py, quantized.py), norms and products
in float32 of what was cast (products.py), the optimizer's kernels (updates.py). It shows that the Python
around the kernels trains, and nothing of the kernels themselves, their speed or their memory.
"""
