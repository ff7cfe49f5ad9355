"""Supervised fine-tuning on worked examples: the cold start."""
