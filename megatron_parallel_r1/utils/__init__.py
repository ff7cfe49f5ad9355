"""Helpers that several rooms share: atomic files, JSON Lines, seeds, timers, LaTeX boxes."""
