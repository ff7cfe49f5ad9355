"""Parallel thoughts: tags, the tree of a trace, its layout for training, and packing.
All other rooms use these types, which depend on neither a model nor an engine."""
