"""Generates flattened traces with vLLM; `native_engine` runs it with the Python of vLLM's environment.

    python vllm_sequences.py MODEL_FOLDER

Reads one line of JSON per run: traces, each [main, paths, rest] of [token ids, tokens to sample]. Replies
with one line: {"seconds", "processor", "drawn"}. Requests a trace's paths when its main chain is done, and
its rest when its paths are; traces do not wait for each other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

ANSWER = "answer: "


def main(folder: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=2048,
        enforce_eager=True,
        block_size=32,
        logprobs_mode="processed_logprobs",
    )
    engine = llm.llm_engine
    print(f"{ANSWER}ready", flush=True)
    for line in sys.stdin:
        traces = json.loads(line)
        processor, began = time.process_time(), time.perf_counter()
        drawn = _run(engine, SamplingParams, traces)
        taken = {"seconds": time.perf_counter() - began, "processor": time.process_time() - processor}
        # Each run starts with an empty cache.
        llm.reset_prefix_cache()
        print(ANSWER + json.dumps(taken | {"drawn": drawn}), flush=True)


def _run(engine: Any, sampling: Any, traces: list[Any]) -> int:
    """Returns the number of sampled tokens."""
    left, drawn = {}, 0

    def request(trace: int, part: str, sequences: list[tuple[list[int], int]]) -> None:
        left[trace] = len(sequences)
        for index, (tokens, count) in enumerate(sequences):
            # With the sampled token's log-prob, which an RL step needs.
            parameters = sampling(
                max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False, logprobs=0
            )
            engine.add_request(f"{trace}/{part}/{index}", {"prompt_token_ids": tokens}, parameters)

    for index, (main_, _, _) in enumerate(traces):
        request(index, "main", [main_])
    while engine.has_unfinished_requests():
        for output in engine.step():
            if not output.finished:
                continue
            drawn += len(output.outputs[0].token_ids)
            index, part = int(output.request_id.split("/")[0]), output.request_id.split("/")[1]
            left[index] -= 1
            if not left[index] and part == "main":
                request(index, "paths", traces[index][1])
            elif not left[index] and part == "paths":
                request(index, "rest", [traces[index][2]])
    return drawn


if __name__ == "__main__":
    main(sys.argv[1])
