"""Readers and writers of model files: Hugging Face folders, safetensors, torch_dist, torch.save."""
