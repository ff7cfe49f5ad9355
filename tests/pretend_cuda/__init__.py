"""Pretend CUDA: tensors that say `cuda:0` and compute on the CPU. They show without a GPU what mixes devices
or makes the host wait; no speed, no memory, no kernel: those only hardware shows."""
