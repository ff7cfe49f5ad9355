"""Old names of recipe keys, read for one release with a warning."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_parallel_r1.errors import UserError

# Path of an old key -> its name now. Parents have their new names; `*` is any stage.
RENAMED: Mapping[str, str] = {
    "micro_tokens": "max_tokens_per_micro_batch",
    "prompt": "prompt_template",
    "tokenizer.vocab": "vocab_size",
    "evaluation.count": "problems",
    "evaluation.samples": "samples_per_problem",
    "evaluation.concurrent": "max_concurrent_rollouts",
    "rollout.concurrent": "max_concurrent_requests",
    "decontamination.words": "ngram_size",
    "decontamination.common": "max_problems_per_ngram",
    "decontamination.least_share": "min_overlap",
    "stages.*.start": "start_from",
    "stages.*.batch": "examples_per_step",
    "stages.*.prompts": "prompts_per_step",
    "stages.*.samples": "samples_per_prompt",
    "stages.*.concurrent": "max_concurrent_rollouts",
    "stages.*.max_staleness": "max_off_policy_steps",
    "stages.*.partial": "partial_rollout",
    "stages.*.dynamic": "dynamic_sampling",
    "stages.*.dynamic_sampling.rounds": "max_rounds",
    "stages.*.dynamic_sampling.over_sample": "oversampling",
    "stages.*.until": "early_stopping",
    "stages.*.early_stopping.best": "mode",
    "stages.*.early_stopping.least_gain": "min_delta",
    "stages.*.early_stopping.least_steps": "min_steps",
    "stages.*.optimizer.warmup": "warmup_steps",
    "stages.*.optimizer.final": "final_lr_fraction",
    "stages.*.optimizer.clip": "clip_grad_norm",
}


def with_new_keys(tree: Any, where: str, renamed: Mapping[str, str] = RENAMED) -> Any:
    """A copy of a recipe's tree with old keys under their new names; warns once for each old name.

    Args:
        where: names the file, or the command line, in a warning and in an error.

    Raises:
        UserError: a mapping has a key under both names.
    """
    return _copy(tree, (), where, renamed)


def new_path(path: Sequence[str], where: str, renamed: Mapping[str, str] = RENAMED) -> list[str]:
    """The path of a `key=value` override, such as `stages.rl.prompts`, in new names."""
    found: list[str] = []
    for part in path:
        new = renamed.get(_pattern((*found, part)))
        if new is not None:
            _warn((*found, part), new, where)
        found.append(new or part)
    return found


def _copy(value: Any, path: tuple[str, ...], where: str, renamed: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        names = [item.get("name") if isinstance(item, dict) else None for item in value]
        return [
            _copy(item, (*path, str(name or index)), where, renamed)
            for index, (item, name) in enumerate(zip(value, names, strict=True))
        ]
    if not isinstance(value, dict):
        return value
    copied: dict[Any, Any] = {}
    for key, inner in value.items():
        new = renamed.get(_pattern((*path, str(key))))
        if new is not None:
            if new in value:
                both = ".".join((*path, str(key)))
                raise UserError(f"{where}: {both} is the old name of {new}, and both are set; remove {key}")
            _warn((*path, str(key)), new, where)
        copied[new or key] = _copy(inner, (*path, str(new or key)), where, renamed)
    return copied


def _pattern(path: Sequence[str]) -> str:
    return ".".join("*" if index == 1 and path[0] == "stages" else part for index, part in enumerate(path))


_warned: set[str] = set()


def _warn(path: Sequence[str], new: str, where: str) -> None:
    pattern = _pattern(path)
    if pattern in _warned or os.environ.get("RANK", "0") != "0":
        return
    _warned.add(pattern)
    old = ".".join(path)
    now = ".".join((*path[:-1], new))
    print(f"warning: {where}: {old} is now {now}; the next release drops the old name", file=sys.stderr)
