"""Tokens/s of the native engine compared with `transformers.generate` and vLLM on the same work, flattened.

    python -m benchmarks.native_engine [--traces 64 256] [--paths 2 4 8] [--repeats 3] [--threads 1]
                                       [--without-vllm] [--write]

Concurrent traces with one block each; segment lengths vary from 0.5 to 1.5 times the pace. The model is the
demo's, with random weights, in float32. Rates count sampled tokens:

    this project   `roll_out` in mode isolated: forks and joins share caches
    generate       `transformers.generate` with its cache, in three batches: the main chains, all paths, and
                   the text after them, each sequence with all preceding text as its prompt; a batch runs
                   until its longest sequence is done
    vLLM           the same sequences in its engine without a server, with prefix caching and continuous
                   batching; skipped with a message unless `make engines` has been run

The benchmark fails if the engine computes a token twice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from benchmarks import vllm_sequences
from benchmarks.embedded_work import EmbeddedWork, Flat, Sequence_, flattened
from benchmarks.paced import Pace
from benchmarks.page import Table, add_write_option, publish
from benchmarks.side_by_side import alternate, ratios, spread
from megatron_parallel_r1.rollout.native.engine import NativeEngine

ROOT = Path(__file__).resolve().parents[1]
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
PACE = Pace(main=12, path=24, summary=12)
OURS, GENERATE, THEIRS = "this project", "generate", "vLLM"


@dataclass(slots=True)
class Way:
    """One implementation; `call` returns sampled tokens, wall-clock seconds and CPU seconds."""

    call: Callable[[], tuple[int, float, float]]
    drawn: int
    cpu: list[float] = field(default_factory=list)

    def rate(self) -> float:
        """Sampled tokens per second."""
        drawn, seconds, processor = self.call()
        assert drawn == self.drawn, f"{drawn} tokens were drawn, not {self.drawn}"
        self.cpu.append(processor / drawn)
        return drawn / seconds


class Generate:
    """A model of `transformers`."""

    def __init__(self, work: EmbeddedWork) -> None:
        config = AutoConfig.for_model(**work.shape.to_hf())
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        self.model.load_state_dict(work.tensors, strict=False)

    def run(self, flats: Sequence[Flat]) -> int:
        batches = [[flat.main for flat in flats], [path for flat in flats for path in flat.paths]]
        return sum(map(self._batch, [*batches, [flat.rest for flat in flats]]))

    @torch.inference_mode()
    def _batch(self, sequences: list[Sequence_]) -> int:
        """Generates until the longest sequence is done; returns the number of requested tokens."""
        longest = max(len(tokens) for tokens, _ in sequences)
        ids = torch.tensor([[0] * (longest - len(tokens)) + tokens for tokens, _ in sequences])
        mask_BL = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens, _ in sequences])
        new_tokens = max(count for _, count in sequences)
        config = GenerationConfig(
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )
        output_BL = self.model.generate(ids, attention_mask=mask_BL, generation_config=config)
        assert output_BL.shape[1] == longest + new_tokens
        return sum(count for _, count in sequences)


class Vllm:
    """vLLM's process, which reads work and replies with times."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.answer()

    def answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(vllm_sequences.ANSWER):
                return line.removeprefix(vllm_sequences.ANSWER)
        raise RuntimeError(f"vLLM's process ended with exit code {self._process.wait()}")

    def run(self, flats: Sequence[Flat]) -> tuple[int, float, float]:
        assert self._process.stdin is not None
        print(json.dumps([(f.main, f.paths, f.rest) for f in flats]), file=self._process.stdin, flush=True)
        reply = json.loads(self.answer())
        return reply["drawn"], reply["seconds"], reply["processor"]


@contextmanager
def vllm(work: EmbeddedWork) -> Iterator[Vllm]:
    with tempfile.TemporaryDirectory() as folder:
        config = {"architectures": ["Qwen3ForCausalLM"], "eos_token_id": work.tags.eos, **work.shape.to_hf()}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file(work.tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        command = [str(VLLM), vllm_sequences.__file__, folder]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        environment.pop("PYTHONPATH", None)
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
        ) as process:
            try:
                yield Vllm(process)
            finally:
                process.kill()


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, nargs="+", default=[64, 256], help="at once")
    parser.add_argument("--paths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without-vllm", action="store_true")
    add_write_option(parser)
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    if not args.without_vllm and not VLLM.exists():
        print("skipping vLLM: no .venv-vllm; `make engines` builds it", flush=True)
    work = EmbeddedWork()
    with nullcontext() if args.without_vllm or not VLLM.exists() else vllm(work) as server:
        table = measure(work, args.traces, args.paths, args.repeats, server)
    publish("native engine", [table], f"CPU, {args.threads} thread, torch {torch.__version__}", args.write)


def measure(
    work: EmbeddedWork, traces: Sequence[int], paths: Sequence[int], repeats: int, server: Vllm | None
) -> Table:
    """All implementations side by side, one row per number of traces and of paths."""
    engine, generate = work.engine(), Generate(work)
    rows = []
    for count in traces:
        for siblings in paths:
            rates, cpu, drawn = _compare(work, engine, generate, server, count, siblings, repeats)
            row = [str(count), str(siblings), str(drawn)]
            row += [spread(rates[name], ".0f") if name in rates else "–" for name in (OURS, GENERATE, THEIRS)]
            for name in (GENERATE, THEIRS):
                row.append(spread(ratios(rates[OURS], rates[name])) if name in rates else "–")
                row.append(f"{median(ratios(cpu[name], cpu[OURS])):.2f}" if name in rates else "–")
            rows.append(row)
    columns = ("traces", "paths", "tokens", "tokens/s", "`generate`", "vLLM", "ours by `generate`")
    return Table(
        "Native engine: sampled tokens per second, the demo's model, float32",
        (*columns, "in CPU time", "ours by vLLM", "in CPU time"),
        rows,
        f"{repeats} repeats; median (lowest to highest). Of a trace {PACE.main} tokens before the block, "
        f"{PACE.path} in a path, {PACE.summary} in the summary and {PACE.main} after it, each times 0.5 "
        "to 1.5. Tokens that the native engine computed twice: 0. Neither engine compiles: vLLM "
        "runs with enforce_eager.",
    )


def _compare(
    work: EmbeddedWork,
    engine: NativeEngine,
    generate: Generate,
    server: Vllm | None,
    count: int,
    siblings: int,
    repeats: int,
) -> tuple[dict[str, list[float]], dict[str, list[float]], int]:
    """Rates and CPU seconds per token of each implementation, and the number of sampled tokens."""
    prompts = work.prompts(count)

    def ours() -> tuple[int, float, float]:
        before = engine.computed_tokens
        processor, began = time.process_time(), time.perf_counter()
        traces = work.traces(engine, PACE, siblings, prompts, varied=True)
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
        # Equal prompts are computed once; the last token of a trace is written by `Paced`.
        once = sum(map(len, {tuple(p) for p in prompts})) + sum(len(trace.tokens) for trace in traces)
        again = engine.computed_tokens - before - once
        assert again == 0, f"{again} tokens were computed twice"
        return sum(sum(trace.sampled) for trace in traces), seconds, processor

    flats = [flattened(trace) for trace in work.traces(engine, PACE, siblings, prompts, varied=True)]

    def generated() -> tuple[int, float, float]:
        processor, began = time.process_time(), time.perf_counter()
        return generate.run(flats), time.perf_counter() - began, time.process_time() - processor

    drawn = sum(flat.drawn for flat in flats)
    ways = {OURS: Way(ours, drawn), GENERATE: Way(generated, drawn)}
    if server is not None:
        ways[THEIRS] = Way(lambda: server.run(flats), drawn)
    rates = alternate({name: way.rate for name, way in ways.items()}, repeats)
    return rates, {name: way.cpu[1:] for name, way in ways.items()}, drawn


if __name__ == "__main__":
    main()
