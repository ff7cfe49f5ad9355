"""Problems to train and evaluate on: the embedded curriculum, made in process, and real data sets.
Everything is deterministic by seed, and a position in it is one integer."""
