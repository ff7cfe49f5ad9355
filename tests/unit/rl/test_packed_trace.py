"""A packed trace is the trace, and knows what every rank needs without unpacking."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.trace import Trace
from tests.reference.traces import TAGS, random_trace

seeds = st.integers(0, 10**6)


def trace_of(seed: int, truncate: bool) -> Trace:
    rng, tokens = random.Random(seed), tuple(random_trace(seed, truncate=truncate))
    tree = parse(tokens, TAGS)
    sampled = tuple(index not in tree.forced() for index in range(len(tokens)))
    suppressed = tuple(rng.random() < 0.2 for _ in tokens)
    # Any double: the largest, the smallest, and one that no float32 holds.
    logprobs = tuple(rng.choice([-0.1, -1e300, -5e-324, 0.0]) for _ in tokens)
    versions = tuple(rng.randrange(9) for _ in tokens) if seed % 2 else ()
    prompt = tuple(rng.randrange(200_000) for _ in range(1 + seed % 3))
    finish = "length" if truncate else "eos"
    return Trace(prompt, tokens, sampled, suppressed, logprobs, finish, tree, versions)


@given(seeds, st.booleans())
def test_a_packed_trace_unpacks_to_an_equal_one(seed: int, truncate: bool) -> None:
    trace = trace_of(seed, truncate)
    packed = pickle.loads(pickle.dumps(PackedTrace.of(trace)))
    assert packed.unpack() == trace and repr(packed.unpack()) == repr(trace)
    assert tuple(packed.column("logprobs")) == trace.logprobs
    outline = packed.outline
    assert (outline.prompt_length, outline.length) == (len(trace.prompt), len(trace.tokens))
    assert (outline.sampled_count, outline.version) == (trace.sampled_count, trace.version)
    assert (outline.finish, outline.tree) == (trace.finish, trace.tree)


def test_the_size_of_a_trace_is_that_of_its_columns() -> None:
    trace = replace(trace_of(1, truncate=False), prompt=(7,) * 100)
    assert len(PackedTrace.of(trace).columns) == 4 * 100 + 18 * len(trace.tokens)
