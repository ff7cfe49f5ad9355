"""Trains the model: one SFT step, one GRPO step, their losses, checkpoints and evaluation.
The steps read like the algorithm; what is Megatron's (schedules, optimizer) lives in `trainer.py`."""
