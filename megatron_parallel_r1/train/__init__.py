"""One optimizer step on packed rows: partition, micro-batches, log-probs, update; and its checkpoints.
`trainer.py` alone deals with Megatron's schedules and optimizer."""
