"""Says what a recipe will do and need on so many processes: layout, steps, tokens, memory, time.
Reads no weights and no data, and starts nothing; the numbers follow from shapes and a machine's rates."""
