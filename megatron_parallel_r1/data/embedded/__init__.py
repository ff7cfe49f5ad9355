"""The embedded curriculum: linear and quadratic congruences modulo 13, which a model of half a million
parameters learns from scratch on a CPU."""
