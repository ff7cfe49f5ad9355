"""The harness's tasks as far as they can be tried without it: the YAML, its functions, its templates.

Not covered: a run of lm-evaluation-harness itself, which is no dependency of this project.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from jinja2 import Template
from pyarrow.parquet import read_table

from megatron_parallel_r1.data.schemas import schema_of
from megatron_parallel_r1.data.trace_text import WrittenTrace
from megatron_parallel_r1.evaluation.benchmarks import PUBLISHED

FOLDER = Path(__file__).parents[3] / "eval/harness"
TRACE = (
    "Add. <Parallel><Path>Final Answer: 7</Path><Path>\\boxed{8}</Path></Parallel>"
    "<Summary>Final Answer: 9</Summary> So.\nFinal Answer: 10"
)


@pytest.fixture(scope="module")
def functions() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parallel_r1", FOLDER / "parallel_r1.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Loader(yaml.SafeLoader):
    """Reads `!function file.name` as the harness does: that function of the file beside the task."""


def load(file: Path, functions: ModuleType) -> dict[str, Any]:
    def function(loader: yaml.Loader, node: yaml.Node) -> Callable[..., Any]:
        module, _, name = loader.construct_scalar(node).rpartition(".")
        assert module == functions.__name__
        return getattr(functions, name)

    Loader.add_constructor("!function", function)
    task = yaml.load(file.read_text(), Loader)
    return {**load(FOLDER / task["include"], functions), **task} if "include" in task else task


@pytest.mark.parametrize("name", PUBLISHED)
def test_tasks(name: str, functions: ModuleType) -> None:
    task = load(FOLDER / f"parallel_r1_{name}.yaml", functions)
    schema = schema_of(PUBLISHED[name].name)
    assert (task["task"], task["dataset_path"]) == (f"parallel_r1_{name}", schema.name)
    assert task.get("dataset_name") == schema.config
    assert task["test_split"] == (PUBLISHED[name].split or schema.split)
    assert task["output_type"] == "generate_until" and task["generation_kwargs"]["until"] == []
    assert task["generation_kwargs"]["max_gen_toks"] > 256
    (pipeline,) = task["filter_list"]
    assert [step["function"] for step in pipeline["filter"]] == ["custom", "take_first"]
    extract = pipeline["filter"][0]["filter_fn"]
    column = task["doc_to_text"].strip("{}").split()[0]
    doc = {column: "9 + 1 = ?", "answer": "Nine and one.\n#### 1,000" if name == "gsm8k" else "1000"}
    assert Template(task["doc_to_text"]).render(doc) == schema.prompt(doc) == "9 + 1 = ?"
    ((answer,),) = extract([["Final Answer: 1000"]], [doc])
    assert task["process_results"](doc, [answer]) == {"exact_match": 1.0}
    assert task["process_results"](doc, [""]) == {"exact_match": 0.0}


def test_the_filter_keeps_shape_and_reads_no_answer_inside_a_block(functions: ModuleType) -> None:
    cut = TRACE[: TRACE.index("<Summary>")]
    assert functions.final_answers([[TRACE, cut], [""]], [{}, {}]) == [["10", ""], [""]]
    assert functions.final_answers([[None]], [{}]) == [[""]]  # the harness gives None for a failed request


def test_main_text_without_and_with_blocks(functions: ModuleType) -> None:
    def main_text(response: str) -> str:
        return WrittenTrace.of(response, strict=False).main

    assert main_text("no tags \\boxed{4}") == "no tags \\boxed{4}"
    assert main_text(TRACE) == "Add. \n So.\nFinal Answer: 10"
    nested = "a<Parallel><Path>b<Parallel><Path>c</Path><Path>d</Path></Parallel><Summary>e</Summary></Path>"
    assert main_text(nested + "<Path>f</Path></Parallel><Summary>g</Summary>h") == "a\nh"
    assert functions.final_answers([["</Path> stray \\boxed{5}"]], [{}]) == [["5"]]


@pytest.mark.parametrize(
    ("answer", "published", "right"),
    [
        ("72", "She sold 48+24 = <<48+24=72>>72.\n#### 72", True),
        ("1000", "#### 1,000", True),
        ("27", 27.0, True),
        (r"\frac{6}{8}", r"\frac{3}{4}", True),
        ("204", 204, True),
        ("203", "204", False),
        (None, "204", False),
    ],
)
def test_right_answers(answer: str | None, published: object, right: bool, functions: ModuleType) -> None:
    assert functions.is_right(answer, published) is right


@pytest.mark.parametrize("name", ["aime24", "aime25", "amc23"])
def test_on_real_rows_it_reads_what_our_reader_reads(
    name: str, real_data: Path, functions: ModuleType
) -> None:
    task, schema = load(FOLDER / f"parallel_r1_{name}.yaml", functions), schema_of(PUBLISHED[name].name)
    for row in read_table(real_data / f"{name}.parquet").to_pylist():
        assert Template(task["doc_to_text"]).render(row).strip() == schema.prompt(row)
        assert functions.process_results(row, [schema.answers(row)[0]]) == {"exact_match": 1.0}, json.dumps(
            row
        )
