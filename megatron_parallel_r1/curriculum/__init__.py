"""Runs a recipe: trains its stages in order, resumes where they stopped, evaluates and releases.
The only room that imports all others."""
