"""lm-evaluation-harness on a served release, beside the harness on the same folder through transformers.

    pip install 'lm_eval[api,hf]'       # into an environment that has this project too
    python -m benchmarks.lm_eval_peer [--checkpoint runs/tiny/release] [--documents 40] [--device cpu]

Starts `parallel-r1 serve`, and runs two tasks with both of the harness's models: `local-completions`, which
reads log-probs with `echo` and `logprobs`, and `hf`. The tasks need no network: multiple choice
(`loglikelihood`) and texts (`loglikelihood_rolling`), of random words that the tokenizer knows. Without a
checkpoint the model is the demo's with random weights, in float32. Prints the largest difference between the
log-likelihoods of a request, how many requests are greedy for one model alone, and the tasks' own figures;
exits with 1 if a difference exceeds `BOUND`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.embedded_work import EmbeddedWork
from benchmarks.serve_load import write_model

# The harness's `hf` sums the log-probs of a text in float32: at 1,000 nats, in steps of 6e-5.
BOUND = 1e-4
LENGTH = 512
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def known_words(tokenizer: Any) -> list[str]:
    """Words of the vocabulary that are one token each, with or without a space before them."""
    texts = (tokenizer.decode([token]).strip() for token in sorted(tokenizer.get_vocab().values()))
    words = dict.fromkeys(text for text in texts if text.isascii() and text.isalnum())
    return [word for word in words if len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1]


def write_tasks(folder: Path, words: list[str], count: int) -> None:
    draws = random.Random(0)

    def some(least: int, most: int) -> str:
        return " ".join(draws.choices(words, k=draws.randint(least, most)))

    rows: dict[str, list[dict[str, Any]]] = {
        "choice": [
            {"question": some(4, 60), "choices": [some(1, 6) for _ in range(4)], "label": draws.randrange(4)}
            for _ in range(count)
        ],
        "rolling": [{"text": some(20, 200)} for _ in range(count)],
    }
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        settings = {"task": f"peer_{name}", "test_split": "test", **source, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(settings))  # JSON is YAML.


@contextmanager
def serving(folder: Path, device: str) -> Iterator[str]:
    """The base address of a server, which is ended afterwards."""
    command = [sys.executable, "-W", "ignore", "-m", "megatron_parallel_r1.cli", "serve", "--port", "0"]
    command += ["--checkpoint", str(folder), "--device", device]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().split()[-1]
        finally:
            server.terminate()


def numbers(nested: Any) -> list[float]:
    """Log-likelihoods and greedy flags of a sample's requests, in order."""
    return (
        [value for item in nested for value in numbers(item)]
        if isinstance(nested, list | tuple)
        else [nested]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

    import lm_eval
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    with ExitStack() as stack:
        tasks = stack.enter_context(tempfile.TemporaryDirectory())
        checkpoint: Path = arguments.checkpoint or Path(tasks) / "model"
        if not arguments.checkpoint:
            write_model(checkpoint, EmbeddedWork())
        url = stack.enter_context(serving(checkpoint, arguments.device))
        folder = str(checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        write_tasks(Path(tasks), known_words(tokenizer), arguments.documents)
        served = {
            "model": None,
            "base_url": f"{url}/v1/completions",
            "tokenizer": folder,
            "max_length": LENGTH,
        }
        models: dict[str, dict[str, Any]] = {
            "local-completions": served | {"num_concurrent": 4},
            "hf": {"pretrained": folder, "dtype": "auto", "max_length": LENGTH},
        }
        results = {
            name: lm_eval.simple_evaluate(
                model=name,
                model_args=model,
                tasks=[f"peer_{task}" for task in TASKS],
                task_manager=TaskManager(include_path=tasks, include_defaults=False),
                batch_size=8,
                device=arguments.device,
                log_samples=True,
                bootstrap_iters=0,
            )
            for name, model in models.items()
        }
    largest = 0.0
    for task in (f"peer_{name}" for name in TASKS):
        ours, theirs = (
            [
                value
                for sample in sorted(result["samples"][task], key=lambda s: s["doc_id"])
                for value in numbers(sample["resps"])
            ]
            for result in results.values()
        )
        pairs = list(zip(ours, theirs, strict=True))
        gaps = [abs(a - b) for a, b in pairs if not isinstance(a, bool)]
        flags = [a != b for a, b in pairs if isinstance(a, bool)]
        largest = max(largest, *gaps)
        print(
            f"{task}: {len(gaps)} requests, largest difference {max(gaps):.1e}, greedy unlike: {sum(flags)}"
        )
        for name, result in results.items():
            figures = {
                key: value for key, value in result["results"][task].items() if isinstance(value, float)
            }
            print(f"  {name:20}", *(f"{key.partition(',')[0]} {value:.6f}" for key, value in figures.items()))
    if largest > BOUND:
        sys.exit(f"the largest difference is {largest:.1e}; {BOUND} was allowed")


if __name__ == "__main__":
    main()
