"""Converts models on disk between Hugging Face's and Megatron's formats: streamed, resumable, with digests.
Also writes release folders, compares checkpoints and inspects them."""
