"""Model architectures: sizes, rotary frequencies, and the table of weight names.
The Megatron model, the native engine and the converters share it."""
