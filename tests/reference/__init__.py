"""Slow references, each from a definition and not from the code under test; for tests alone."""
