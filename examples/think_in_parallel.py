"""Poses one question to a released model, which thinks in parallel in this process.

    python examples/think_in_parallel.py runs/tiny/release "What is 17 * 3?"

The folder holds all that is needed: weights, tokenizer with the tags, and the decoding settings in
thinking.json. transformers' `generate` cannot decode it: at `<Parallel>` the context forks into N paths, none
of which sees the others, and the main chain continues after all of them.
"""

from __future__ import annotations

import sys

from megatron_parallel_r1 import ParallelThinker
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.exit import one_line_exit


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("usage: think_in_parallel.py RELEASE QUESTION")
    folder, question = sys.argv[1:]
    (response,) = ParallelThinker.load(folder).generate(question)
    print(response.text)
    counts = f"{response.tokens} tokens, {response.critical_tokens} on the critical path"
    print(f"\n{counts}, {response.blocks} parallel blocks", file=sys.stderr)


if __name__ == "__main__":
    with one_line_exit():
        main()
