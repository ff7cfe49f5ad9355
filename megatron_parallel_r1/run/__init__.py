"""One run: its folder, its context, and the loop around a stage's steps."""
