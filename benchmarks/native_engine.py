"""Tokens a second of the native engine beside `transformers.generate` and vLLM on the same work, flattened.

    python -m benchmarks.native_engine [--traces 64 256] [--paths 2 4 8] [--repeats 3] [--threads 1]
                                       [--without-vllm] [--write]

So many traces at once, each with one block; stretches have known lengths that differ, from half the pace to
half above. The model is the demo's, with random weights, in float32. Rates count drawn tokens:

    this project   `roll_out` in mode isolated: forks and joins share caches
    generate       `transformers.generate` with its cache, in three batches: the main chains, all paths, and
                   what follows them, each sequence with all before it as its prompt; a batch runs until its
                   longest sequence is done
    vLLM           the same sequences in its engine without a server, with prefix caching and continuous
                   batching; left out, with a line, where `make engines` has not been run

The engine must compute each token once, or the benchmark ends with an error.
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
    """One way to do the work; returns drawn tokens and the seconds of wall clock and processor."""

    call: Callable[[], tuple[int, float, float]]
    drawn: int
    cpu: list[float] = field(default_factory=list)

    def rate(self) -> float:
        """Drawn tokens a second."""
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
        """Draws for all until the longest is done; tokens that were asked for."""
        longest = max(len(tokens) for tokens, _ in sequences)
        ids = torch.tensor([[0] * (longest - len(tokens)) + tokens for tokens, _ in sequences])
        there = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens, _ in sequences])
        most = max(count for _, count in sequences)
        how = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=most, eos_token_id=None, pad_token_id=0, use_cache=True
        )
        made = self.model.generate(ids, attention_mask=there, generation_config=how)
        assert made.shape[1] == longest + most
        return sum(count for _, count in sequences)


class Vllm:
    """Its process, which reads work and answers with times."""

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
        told = json.loads(self.answer())
        return told["drawn"], told["seconds"], told["processor"]


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
    told = parser.parse_args(words)
    torch.set_num_threads(told.threads)
    if not told.without_vllm and not VLLM.exists():
        print("vLLM is left out: no .venv-vllm; `make engines` builds it", flush=True)
    work = EmbeddedWork()
    with nullcontext() if told.without_vllm or not VLLM.exists() else vllm(work) as server:
        table = measure(work, told.traces, told.paths, told.repeats, server)
    publish("native engine", [table], f"CPU, {told.threads} thread, torch {torch.__version__}", told.write)


def measure(
    work: EmbeddedWork, traces: Sequence[int], paths: Sequence[int], repeats: int, server: Vllm | None
) -> Table:
    """All ways side by side, a row for each number of traces and of paths."""
    engine, generate = work.engine(), Generate(work)
    rows = []
    for count in traces:
        for siblings in paths:
            found, cpu, drawn = _compare(work, engine, generate, server, count, siblings, repeats)
            row = [str(count), str(siblings), str(drawn)]
            row += [spread(found[name], ".0f") if name in found else "–" for name in (OURS, GENERATE, THEIRS)]
            for name in (GENERATE, THEIRS):
                row.append(spread(ratios(found[OURS], found[name])) if name in found else "–")
                row.append(f"{median(ratios(cpu[name], cpu[OURS])):.2f}" if name in found else "–")
            rows.append(row)
    columns = ("traces", "paths", "tokens", "tokens/s", "`generate`", "vLLM", "ours by `generate`")
    return Table(
        "Native engine: drawn tokens a second, the demo's model, float32",
        (*columns, "in CPU time", "ours by vLLM", "in CPU time"),
        rows,
        f"{repeats} repeats; median (lowest to highest). Of a trace {PACE.main} tokens before the block, "
        f"{PACE.path} in a path, {PACE.summary} in the summary and {PACE.main} behind it, each from half as "
        "many to half more. Tokens that the native engine computed twice: 0. Neither engine compiles: vLLM "
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
    """Rates and processor seconds a token of each way, and the tokens drawn."""
    prompts = work.prompts(count)

    def ours() -> tuple[int, float, float]:
        before = engine.computed_tokens
        processor, began = time.process_time(), time.perf_counter()
        made = work.traces(engine, PACE, siblings, prompts, varied=True)
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
        # Equal prompts are written once; the last token of a trace is written by the pace.
        once = sum(map(len, {tuple(p) for p in prompts})) + sum(len(trace.tokens) for trace in made)
        again = engine.computed_tokens - before - once
        assert again == 0, f"{again} tokens were computed twice"
        return sum(sum(trace.sampled) for trace in made), seconds, processor

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
