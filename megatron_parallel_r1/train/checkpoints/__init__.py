"""Training checkpoints: written in the background and atomically, verified when read.
A checkpoint saved under any parallel layout loads under any other."""
