"""Evaluation of a checkpoint, in the decoding loop that trained it: benchmarks, records, statistics, tables.

`curriculum/` evaluates within a run; this room evaluates any released folder, and compares several."""
