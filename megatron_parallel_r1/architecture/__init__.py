"""Model architectures: sizes, rotary frequencies, and the table of weight names.
The model, the native engine and the converters read it."""
