"""Runs a recipe: its stages one after the other, resumed where they stopped, then evaluated and released.
Here the rooms meet; each file is one part of a run."""
