"""A real Megatron-Core GPT under a layout: from and to Hugging Face Qwen3, on one CPU or on a cluster.
It computes log-probabilities and gradients, and knows nothing of rollouts, rewards or data."""
