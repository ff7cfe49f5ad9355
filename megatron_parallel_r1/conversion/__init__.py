"""Models on disk from Hugging Face's form to Megatron's and back: streamed in bounded memory, resumable,
with digests. Release folders are made, and any two folders compared, here too."""
