"""Poses one question to a released model, which thinks in parallel in this process.

    python examples/think_in_parallel.py runs/tiny/release "What is 17 * 3?"

The folder holds all that is needed: weights, tokenizer with the tags, and the decoding settings in
thinking.json. transformers' `generate` cannot decode it: at `<Parallel>` the context forks into N paths, none
of which sees the others, and the main chain continues after all of them.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from megatron_parallel_r1.data.prompts import decode, encode_prompt
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.serve.served_model import ServedModel
from megatron_parallel_r1.utils.exit import one_line_exit


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("usage: think_in_parallel.py RELEASE QUESTION")
    folder, question = Path(sys.argv[1]), sys.argv[2]
    model = ServedModel.load(folder)
    prompt = encode_prompt(model.tokenizer, model.template, question)
    thinker = Thinker(model.engine, model.tags, model.thinking)
    (trace,) = asyncio.run(roll_out(thinker, [prompt], [0], 1))
    print(decode(model.tokenizer, trace.tokens))
    blocks = list(trace.tree.all_blocks())
    paths = sum(len(block.paths) for _, block in blocks)
    print(f"\n{len(trace.tokens)} tokens, {len(blocks)} parallel blocks with {paths} paths", file=sys.stderr)


if __name__ == "__main__":
    with one_line_exit():
        main()
