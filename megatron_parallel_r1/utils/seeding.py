"""Seeds derived from other seeds, so that every random draw of a run is reproducible."""

from __future__ import annotations

import hashlib
import zlib

import numpy as np


def derive_seed(seed: int, *purpose: str) -> int:
    """Returns a 32-bit seed for one purpose of a run; purposes are independent of each other."""
    keys = [zlib.crc32(word.encode()) for word in purpose]
    return int(np.random.SeedSequence([seed, *keys]).generate_state(1)[0])


def seed_series(count: int, *entropy: int) -> list[int]:
    """Returns `count` 63-bit seeds; a longer series begins with the shorter one."""
    return (np.random.SeedSequence(entropy).generate_state(count, np.uint64) >> np.uint64(1)).tolist()


def hash_seed(text: str) -> int:
    """Returns the 63-bit seed that `text` hashes to; similar texts give unrelated seeds."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
