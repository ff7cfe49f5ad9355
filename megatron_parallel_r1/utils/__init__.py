"""Helpers that several rooms share: JSON Lines, seeding, timers, LaTeX boxes."""
