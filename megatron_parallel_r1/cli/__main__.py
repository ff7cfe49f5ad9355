"""`python -m megatron_parallel_r1.cli`, for launchers such as torchrun."""

from megatron_parallel_r1.cli import main

if __name__ == "__main__":
    main()
