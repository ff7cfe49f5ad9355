"""The Triton kernels of attention under a layout, a file each. Import needs Triton; see launch.py."""
