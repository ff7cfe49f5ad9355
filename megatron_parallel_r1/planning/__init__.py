"""Predicts what a recipe does and needs on a number of ranks: layout, steps, tokens, memory, time.
Reads no weights and no data; the numbers follow from sizes and a machine's rates."""
