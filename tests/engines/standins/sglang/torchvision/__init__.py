"""Stands in for torchvision where SGLang serves text on a CPU: image code imports it, nothing calls it."""

from . import io, transforms

# transformers asks whether it is new enough.
__version__ = "0.28.0"
__all__ = ["io", "transforms"]
