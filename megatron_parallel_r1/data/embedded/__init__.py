"""The embedded curriculum: congruences modulo 13, from a linear to a quadratic unknown.
Small enough that a model of half a million parameters learns them from scratch on a CPU."""
