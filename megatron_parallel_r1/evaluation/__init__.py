"""Evaluation with the decoding loop of the training: held-out problems within a run, and benchmarks of any
checkpoint with cached responses, paired tests and tables."""
