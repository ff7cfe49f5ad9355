"""Transforms no images; only the names exist."""

from . import functional

__all__ = ["functional"]
