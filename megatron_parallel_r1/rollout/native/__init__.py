"""The in-process engine: batched decoding in which siblings share their prefix's key/value cache.
A summary reads the caches of its paths as they were written; nothing is computed twice."""
