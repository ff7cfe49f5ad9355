"""Twins of the flagship recipes that a CPU trains: all keys of the flagship, a tiny model, a few problems.

A twin keeps each value that `SHRUNK` does not name, so no key is left out: a new key of a flagship is in its
twin from the start. Data sets keep their names, and with them their readers; they only get a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.checkpoint_formats.hf_folder import save_hf_folder
from megatron_parallel_r1.config.reader import read_tree
from megatron_parallel_r1.data.prompts import TEMPLATES
from megatron_parallel_r1.data.tokenizers import train_tokenizer
from megatron_parallel_r1.model.weights import random_hf_tensors

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@dataclass(frozen=True, slots=True)
class Flagship:
    """A recipe as a cluster runs it.

    Attributes:
        name: of its file below recipes/, without the ending.
        nodes: fewest nodes, of 8 GPUs.
        site: settings of slurm/site.env.
        added: overrides that its RL jobs add.
    """

    name: str
    nodes: int
    site: Mapping[str, str] = field(default_factory=dict)
    added: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return RECIPES / f"{self.name}.yaml"

    @property
    def training_gpus(self) -> int:
        return 8 * (self.nodes - int(self.site.get("ROLLOUT_NODES", 0)))


_ADDED = ("rollout.engine=sglang", "rollout.urls_file=urls")
FLAGSHIPS = (
    Flagship("qwen3_4b/one_node", nodes=1),
    Flagship("qwen3_4b/servers", nodes=2, site={"ROLLOUT_NODES": "1"}, added=_ADDED),
    Flagship("qwen3_8b/one_node", nodes=1),
    Flagship("qwen3_8b/servers", nodes=2, site={"ROLLOUT_NODES": "1"}, added=_ADDED),
)
# Mixtures of experts, which have no twin: tests/parallel trains one under expert parallelism.
MIXTURES = (
    Flagship("qwen3_30b_a3b/one_node", nodes=1),
    Flagship(
        "qwen3_30b_a3b/servers",
        nodes=2,
        site={"ROLLOUT_NODES": "1", "ROLLOUT_SERVERS": "4", "ROLLOUT_TENSOR": "2"},
        added=_ADDED,
    ),
    Flagship(
        "qwen3_235b_a22b/servers",
        nodes=16,
        site={"ROLLOUT_NODES": "8", "ROLLOUT_SERVERS": "1", "ROLLOUT_TENSOR": "8"},
        added=_ADDED,
    ),
)

# Values of a twin that are not its flagship's, besides paths; `*` is any stage.
SHRUNK: Mapping[str, Any] = MappingProxyType(
    {
        "name": "twin",
        "max_tokens_per_micro_batch": 1024,
        "max_prompt_tokens": 240,
        "max_example_tokens": 360,
        "thinking.max_path_tokens": 16,
        "thinking.max_response_tokens": 60,
        "stages.sft.steps": 16,
        "stages.sft.optimizer.lr": 1e-2,
        "stages.*.steps": 1,
        "stages.*.optimizer.lr": 1e-3,
        "stages.*.examples_per_step": 8,
        "stages.*.prompts_per_step": 4,
        "stages.*.samples_per_prompt": 4,
        "stages.*.max_concurrent_rollouts": 16,
        "evaluation.problems": 4,
        "evaluation.samples_per_problem": 2,
        "evaluation.max_concurrent_rollouts": 16,
        "rollout.servers": 1,
        "rollout.memory_share": 0.9,
    }
)


def twin_of(flagship: Flagship, folder: Path) -> Path:
    """Writes the twin's recipe, model and data into a folder, where it will run; returns the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = read_tree(flagship.path)
    for key, _ in leaves(tree):
        if rule := rule_of(key):
            _set(tree, key, SHRUNK[rule])
    if "folder" in tree["rollout"]["sync"]:
        tree["rollout"]["sync"]["folder"] = str(folder / "sync")
    tree["out"] = str(folder / "runs")
    tree["model"]["path"] = str(write_model(folder / "model"))
    for data in data_sets(tree):
        data["path"] = str(write_rows(folder, data["name"]))
    recipe = folder / "twin.yaml"
    recipe.write_text(yaml.safe_dump(tree, sort_keys=False))
    return recipe


def rule_of(key: str) -> str | None:
    """The rule of `SHRUNK` for a key: the stage's own, or that of any stage."""
    first, *rest = key.split(".")
    any_stage = ".".join([first, "*", *rest[1:]])
    return next((rule for rule in (key, any_stage) if rule in SHRUNK), None)


def leaves(tree: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each key with a value of its own, by its path; a member of a list goes by its name or index."""
    if isinstance(tree, list):
        tree = {each["name"] if isinstance(each, dict) else index: each for index, each in enumerate(tree)}
    if not isinstance(tree, dict) or not tree:
        yield before, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{before}.{key}" if before else str(key))


def data_sets(tree: Any) -> Iterator[dict[str, Any]]:
    """Yields every data set of a recipe."""
    if isinstance(tree, dict) and tree.get("source") == "dataset":
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from data_sets(value)


def _set(tree: Any, key: str, value: Any) -> None:
    *way, last = key.split(".")
    for part in way:
        tree = next(each for each in tree if each["name"] == part) if isinstance(tree, list) else tree[part]
    tree[last] = value


# Two answers only, so that a model which has learned the form is right now and then, and wrong as often.
ANSWERS = (7, 9)


def _problems(kind: str) -> list[tuple[str, str]]:
    sums = [(a, answer - a, answer) for answer in ANSWERS for a in range(1, 7)]
    return [(f"{kind}: {a} + {b} = ?", str(answer)) for a, b, answer in sums]


def _response(answer: str) -> str:
    path, summary = f"<Path> {answer} </Path>", f"<Summary> {answer} </Summary>"
    return f"<Parallel>{path}{path}</Parallel>{summary} Final Answer: {answer}"


def _rows(name: str) -> list[dict[str, Any]]:
    """Rows as the data set of this name has them."""
    match name:
        case "openai/gsm8k":
            return [{"question": text, "answer": f"#### {answer}"} for text, answer in _problems("easy")]
        case "Parallel-R1/Parallel-GSM8K":
            return [
                {"question": text, "answer": answer, "response": _response(answer)}
                for text, answer in _problems("worked")
            ]
        case "BytedTsinghua-SIA/DAPO-Math-17k":
            return [
                {"prompt": [{"role": "user", "content": text}], "reward_model": {"ground_truth": answer}}
                for text, answer in _problems("hard")
            ]
        case _:
            return [{"problem": text, "question": text, "answer": answer} for text, answer in _problems(name)]


def write_rows(folder: Path, name: str) -> Path:
    """Writes a few rows of the data set of this name."""
    file = folder / f"{name.replace('/', '_')}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in _rows(name)))
    return file


def write_model(folder: Path) -> Path:
    """Writes a tiny Qwen3 in bfloat16; like the real one it has rows for the tags, and no tags."""
    texts = [TEMPLATES["parallel"]] * 4 + [text for text, _ in _problems("worked")] + [_response("79")]
    tokenizer = train_tokenizer(texts, vocab_size=480)
    shape = ModelConfig(64, 2, 4, 2, 16, 128, vocab=512, rope_theta=1e4, tied=True, max_positions=1024)
    tensors = ((name, tensor.to(torch.bfloat16)) for name, tensor in random_hf_tensors(shape, 1, std=0.1))
    save_hf_folder(folder, shape, tensors, tokenizer)
    return folder
