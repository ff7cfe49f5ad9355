"""Speed-up by parallel thinking, compared with sequential thinking of the same number of tokens.

    python -m benchmarks.critical_path [--paths 2 4 8] [--traces 1 4] [--repeats 5] [--threads 1] [--write]

The native engine generates traces with one block in mode isolated, and responses without a block of exactly
as many tokens. Token ratio: all tokens / tokens on the critical path (one path per block; all paths have the
same length). Time ratio: sequential / parallel seconds in the same repeat. Their quotient is 1 if a forward
pass costs the same however many sequences it decodes. The share of the saving relates the seconds saved to
those that the token ratio would save.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from statistics import median

import torch

from benchmarks.embedded_work import EmbeddedWork
from benchmarks.paced import Pace, Paced
from benchmarks.page import Table, add_write_option, publish
from benchmarks.side_by_side import alternate, ratios, spread
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out

PACE = Pace(main=16, path=64, summary=16)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--traces", type=int, nargs="+", default=[1, 4], help="at once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    add_write_option(parser)
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    table = measure(args.traces, args.paths, args.repeats, PACE)
    publish("critical path", [table], f"CPU, {args.threads} thread, torch {torch.__version__}", args.write)


def measure(traces: Sequence[int], paths: Sequence[int], repeats: int, pace: Pace) -> Table:
    """One row per number of concurrent traces and of paths."""
    work = EmbeddedWork()
    engine = work.engine()
    rows = []
    for count in traces:
        for siblings in paths:
            rows.append(_row(work, engine, count, siblings, repeats, pace))
    columns = ("traces", "paths", "tokens", "critical", "token ratio", "time ratio", "CPU time ratio")
    return Table(
        "Critical path: sequential / parallel thinking, equally many tokens",
        (*columns, "time by token ratio", "share of the saving"),
        rows,
        f"{repeats} repeats; median (lowest to highest). {pace.main} tokens before the block, "
        f"{pace.path} in a path, {pace.summary} in the summary and {pace.main} after it. The share of the "
        "saving relates to the seconds that the token ratio would save. The demo's model, float32.",
    )


def _row(
    work: EmbeddedWork, engine: NativeEngine, count: int, siblings: int, repeats: int, pace: Pace
) -> list[str]:
    total = pace.trace(siblings)
    critical = pace.trace(1)
    prompts = work.prompts(count)
    cpu: dict[str, list[float]] = {"parallel": [], "sequential": []}

    def timed(name: str) -> float:
        processor, began = time.process_time(), time.perf_counter()
        traces = (
            work.traces(engine, pace, siblings, prompts, varied=False)
            if name == "parallel"
            else asyncio.run(roll_out(_sequential(work, engine, total), prompts, range(count), count))
        )
        seconds = time.perf_counter() - began
        cpu[name].append(time.process_time() - processor)
        lengths = {len(trace.tokens) for trace in traces}
        assert lengths == {total}, f"{name}: traces of {lengths} tokens, not {total}"
        return seconds

    measured = alternate({name: lambda name=name: timed(name) for name in cpu}, repeats)
    times = ratios(measured["sequential"], measured["parallel"])
    processor = ratios(cpu["sequential"][1:], cpu["parallel"][1:])
    ratio = total / critical
    saved = median((1 - 1 / speedup) / (1 - 1 / ratio) for speedup in times)
    cells = [str(count), str(siblings), str(total), str(critical), f"{ratio:.2f}", spread(times)]
    return [
        *cells,
        f"{median(processor):.2f}",
        spread([speedup / ratio for speedup in times]),
        f"{saved:.2f}",
    ]


def _sequential(work: EmbeddedWork, engine: NativeEngine, tokens: int) -> Thinker[object]:
    """Generates exactly `tokens` tokens without a block."""
    thinking = Thinking(mode="sequential", max_response_tokens=tokens)
    paced = Paced(engine, work.tags, Pace(main=tokens, path=2, summary=2))
    return Thinker(paced, work.tags, thinking)


if __name__ == "__main__":
    main()
