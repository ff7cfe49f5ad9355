"""A training state on disk: written in the background, complete or absent, checked when it is read.
One that was saved under any parallel layout is loaded under any other."""
