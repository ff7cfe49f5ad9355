"""Transforms no images."""
