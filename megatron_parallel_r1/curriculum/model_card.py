"""The model card and `thinking.json` of a release: training, data, evaluation, decoding settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_parallel_r1.architecture.families import FAMILIES
from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import parameter_count
from megatron_parallel_r1.config.data import DataSet, DistilledTraces, data_sets
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.stages import DistillStage, RlStage, SftStage
from megatron_parallel_r1.data.prompts import TEMPLATES, template_text
from megatron_parallel_r1.report.evaluation_table import evaluation_table
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.run.folder import steps_done
from megatron_parallel_r1.thought.format_settings import format_of
from megatron_parallel_r1.utils.hub import is_hub_name
from megatron_parallel_r1.utils.tables import markdown_table

_HABIT = {
    "isolated": "paths do not see one another",
    "replay": "paths do not see one another, a summary reads them as one text",
    "causal": "each path sees the ones before it",
}


@dataclass(frozen=True, slots=True)
class ReleasePoint:
    """The stage and step of a run whose weights are released.

    Attributes:
        step: a step of the stage; None: its last.
    """

    stage: SftStage | RlStage
    step: int | None = None


def thinking_json(recipe: Recipe, folder: Path, at: ReleasePoint) -> str:
    """The decoding settings and prompt of a stage, and the number of steps since the run's initial weights.

    Args:
        folder: the run folder.
        at: stage and step of the weights.
    """
    settings = recipe.thinking_of(at.stage).model_dump() | {
        "prompt": recipe.prompt_template if recipe.prompt_template in TEMPLATES else "own",
        "prompt_template": template_text(recipe.prompt_template),
        "stage": at.stage.name,
        "step": sum(_steps(recipe, folder, at).values()),
    }
    return json.dumps(settings, indent=2) + "\n"


def _habit(thinking: Thinking) -> str:
    """What the model does, in a relative clause."""
    if thinking.mode == "sequential":
        return "that thinks in one chain, the baseline of parallel thinking"
    format = format_of(thinking.format)
    plan = f", plans their paths up to `{format.fork}`" if format.plan else ""
    read = f", reads their `{format.path}`s in a `{format.summary}`" if format.summary else ""
    blocks = f"it opens `{format.open}` blocks{plan}{read}, goes on"
    return f"that thinks in parallel: {blocks}; {_HABIT[thinking.mode]}"


def _paths(thinking: Thinking) -> str:
    planned = format_of(thinking.format).plan is not None
    return f"1 to {thinking.most_paths} planned paths" if planned else f"{thinking.paths} paths"


def run_card(
    recipe: Recipe,
    folder: Path,
    shape: ModelConfig,
    evaluations: Sequence[dict[str, Any]],
    at: ReleasePoint,
) -> str:
    """The model card of a run.

    Args:
        folder: the run folder.
        evaluations: evaluation records of the run.
        at: stage and step of the weights.
    """
    past = lineage(recipe, at.stage)
    thinking = recipe.thinking_of(at.stage)
    steps = _steps(recipe, folder, at)
    stages = markdown_table(
        ("stage", "kind", "data", "steps"),
        [(stage.name, stage.kind, _data(stage), steps[stage.name]) for stage in past],
        "lllr",
    )
    figures = evaluation_table(evaluations).markdown() if evaluations else "This run was not evaluated."
    training = f"""{stages}

Seed {recipe.seed}; the last stage in mode `{thinking.mode}` with {_paths(thinking)} a block.
{_start(recipe)}

<details><summary>The whole recipe</summary>

```yaml
{recipe.yaml().strip()}
```

</details>"""
    evaluation = f"Plain accuracy on held-out problems, with its 95 % interval.\n\n{figures}"
    base, files = recipe.model.path, recipe.model.folder
    facts = {"license": "apache-2.0"}
    if base is not None and files is not None:
        facts = {**licence(files), "base_model": _name(base)}
    methods = tuple(dict.fromkeys(tag for stage in past for tag in _methods(stage)))
    return card(recipe.name, shape, thinking, facts, training, _provenance(recipe, past), evaluation, methods)


def card(
    name: str,
    shape: ModelConfig,
    thinking: Thinking,
    facts: Mapping[str, str],
    training: str,
    data: str,
    evaluation: str,
    methods: Sequence[str] = (),
) -> str:
    """A model card.

    Args:
        facts: metadata for the YAML header, such as the licence.
        training, data, evaluation: sections in Markdown.
        methods: of the training, as tags of the Hub.
    """
    head = yaml.safe_dump({"library_name": "transformers", **facts}, sort_keys=False).strip()
    kind = FAMILIES[shape.family].architecture.removesuffix("ForCausalLM")
    return f"""---
{head}
tags: [{", ".join(("parallel-thinking", *methods))}]
---

# {name}

A {kind} of {parameter_count(shape) / 1e6:.2f} M parameters {_habit(thinking)}.
Trained with megatron_parallel_r1 after Parallel-R1 (arXiv 2509.07980).

`AutoModelForCausalLM` loads it, and so do SGLang and vLLM. To decode as trained, use the settings in
`thinking.json` with megatron_parallel_r1.

## Training

{training}

## Data

{data}

## Evaluation

{evaluation}
"""


def licence(folder: Path) -> dict[str, str]:
    """The licence metadata in the model card of a folder, as the Hub reads it; `unknown` without any."""
    try:
        header = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
        keys = ("license", "license_name", "license_link")
        metadata = {key: str(header[key]) for key in keys if key in header}
    except (OSError, ValueError, IndexError, TypeError, yaml.YAMLError):
        metadata = {}
    return {"license": "unknown", **metadata}


def lineage(recipe: Recipe, last: SftStage | RlStage) -> list[SftStage | RlStage]:
    """The stages that trained the weights of `last`, in order."""
    return [*recipe.trained_before(last), last]


def _steps(recipe: Recipe, folder: Path, at: ReleasePoint) -> dict[str, int]:
    """Steps of each stage that trained the weights, by stage name."""
    steps = {stage.name: steps_done(folder, stage) for stage in lineage(recipe, at.stage)}
    return steps if at.step is None else steps | {at.stage.name: at.step}


def _methods(stage: SftStage | RlStage) -> tuple[str, ...]:
    """The tags of a stage's method; an advantage of the user's own has none."""
    if isinstance(stage, SftStage):
        return ("sft",)
    advantage = stage.objective.advantage
    return ("reinforcement-learning", *([] if ":" in advantage else [advantage.replace("_", "-")]))


def _name(model: Path) -> str:
    """The name of a model on the Hub, or by its folder: of a run's release `run`, of a stage `run-stage`."""
    if is_hub_name(model):
        return str(model).partition("@")[0]
    real = model.resolve()
    if real.name == "release":
        return real.parent.name
    if real.name == "model" and (real.parents[1] / "config.yaml").is_file():
        return f"{real.parents[1].name}-{real.parent.name}"
    return model.name


def _start(recipe: Recipe) -> str:
    if recipe.model.path is None:
        return "It was trained from random weights."
    return f"It began as the weights of `{_name(recipe.model.path)}`, whose licence holds for it, too."


def _provenance(recipe: Recipe, past: Sequence[SftStage | RlStage]) -> str:
    """The origin of each data set, and what was excluded from it."""
    sampled = {stage.name: stage.data for stage in recipe.stages if isinstance(stage, DistillStage)}
    lines: dict[str, None] = {}
    for stage in past:
        source, what = stage.data, ""
        if isinstance(source, DistilledTraces):
            what = f"right, well-formed traces that stage `{source.stage}` sampled from the model itself, of "
            source = sampled[source.stage]
        lines |= dict.fromkeys(f"- {what}{_origin(data)}" for data in data_sets(source) or (source,))
    if recipe.evaluation is not None:
        held_out = recipe.evaluation.data
        origins = "; ".join(_origin(data) for data in data_sets(held_out) or (held_out,))
        lines[f"- held out, for evaluation: {origins}"] = None
    kept_out = "No problem of the evaluation is among those of the training."
    if recipe.decontamination is not None:
        kept_out += (
            f" Problems that share {recipe.decontamination.ngram_size} words in a row with one were left out."
        )
    return "\n".join(lines) + f"\n\n{kept_out}"


def _origin(data: Any) -> str:
    if isinstance(data, DataSet):
        split = f", split `{data.split}`" if data.split else ""
        limit = f", the first {data.limit}" if data.limit else ""
        local = f", read from `{data.path.name}`" if data.path else " on the Hugging Face Hub"
        return f"`{data.name}`{local}{split}{limit}"
    settings = ", ".join(f"{key} {value}" for key, value in data.model_dump().items() if key != "source")
    return f"`{data.source}`: synthetic, made by megatron_parallel_r1 ({settings})"


def _data(stage: SftStage | RlStage) -> str:
    data = stage.data
    if sets := data_sets(data):
        return " + ".join(data.name for data in sets)
    if isinstance(data, DistilledTraces):
        return f"traces of {data.stage}"
    kind = getattr(data, "kind", None)
    return f"{data.source} ({kind})" if kind else data.source
