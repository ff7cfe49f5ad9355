"""Traces of a run as trees in a terminal: `parallel-r1 traces RUN`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rich.text import Text
from rich.tree import Tree as RichTree

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.report.run_folder import read_run
from megatron_parallel_r1.utils.jsonl import JsonRecord

Kind = Literal["all", "right", "wrong", "malformed"]
VERDICTS = {True: Text("right", "green"), False: Text("wrong", "red"), None: Text("unknown", "dim")}


def chosen_traces(
    run: Path, stage: str | None, step: int | None, kind: Kind, longest: bool, count: int
) -> list[tuple[str, JsonRecord]]:
    """Returns the recorded traces that match, with their stages: the last ones, or the longest.

    Raises:
        UserError: the folder holds no run, or no trace of it matches.
    """
    stages = read_run(run).stages
    if stage is not None and stage not in (each.name for each in stages):
        raise UserError(f"{run}: no stage {stage}; it has {', '.join(each.name for each in stages)}")
    found = [
        (each.name, record)
        for each in stages
        for record in each.traces
        if stage in (None, each.name) and step in (None, record["step"]) and _is(record, kind)
    ]
    if not found:
        raise UserError(f"{run}: no recorded trace matches; ask for another stage, step or kind")
    if longest:
        found.sort(key=lambda pair: text_length(pair[1]))
    return found[-count:]


def trace_tree(stage: str, record: JsonRecord) -> RichTree:
    """The tree of one trace: its texts, and under each block the paths with their own answers."""
    # A token can be half of a character, which no terminal takes.
    record = json.loads(json.dumps(record, ensure_ascii=False).encode("utf-8", errors="replace"))
    head = Text.assemble(f"{stage}, step {record['step']}: ", VERDICTS[record.get("correct")])
    if record.get("reward") is not None:
        head.append(f", reward {record['reward']:.3g}")
    if record.get("finish") == "length":
        head.append(", truncated", "yellow")
    tree = RichTree(head)
    tree.add(Text.assemble(("problem  ", "bold"), str(record.get("problem", "–"))))
    stated = record.get("extracted")
    answer = f"{'none' if stated is None else stated}, right is {record.get('answer', '–')}"
    _add_parts(tree, record["text_parts"])
    tree.add(Text.assemble(("answer  ", "bold"), answer))
    return tree


def is_malformed(record: JsonRecord) -> bool:
    """Whether a block of the trace is not well-formed."""
    return any(not block["well_formed"] for block in _blocks(record["text_parts"]))


def text_length(record: JsonRecord) -> int:
    """Characters of a trace's texts, tags counted roughly; to sort by."""
    return len(json.dumps(record["text_parts"]))


def _add_parts(tree: RichTree, parts: list[Mapping[str, Any]]) -> None:
    for part in parts:
        if part["kind"] != "block":
            tree.add(Text(part["text"].strip()))
            continue
        flaw = () if part["well_formed"] else (Text(", not well-formed", "yellow"),)
        block = tree.add(Text.assemble((_count(len(part["paths"])), "bold cyan"), *flaw))
        for number, path in enumerate(part["paths"], 1):
            _add_path(block, number, path)
        if part.get("stray"):
            block.add(Text.assemble(("outside the paths  ", "yellow"), part["stray"].strip()))
        if part.get("summary") is not None:
            block.add(Text.assemble(("summary  ", "bold"), part["summary"].strip()))


def _add_path(block: RichTree, number: int, path: Mapping[str, Any]) -> None:
    head = Text.assemble((f"path {number}", "cyan"))
    if path.get("answer") is not None:
        head.append_text(Text.assemble(f": {path['answer']}, ", VERDICTS[path.get("correct")]))
    head.append(", closed by the engine" if path.get("forced") else "", "yellow")
    head.append("" if path.get("closed", True) else ", cut off", "yellow")
    branch = block.add(head)
    if path.get("parts"):
        _add_parts(branch, path["parts"])
    else:
        branch.add(Text(path["text"].strip()))


def _count(paths: int) -> str:
    return "1 path" if paths == 1 else f"{paths} paths"


def _is(record: JsonRecord, kind: Kind) -> bool:
    match kind:
        case "right" | "wrong":
            return record.get("correct") is (kind == "right")
        case "malformed":
            return is_malformed(record)
        case _:
            return True


def _blocks(parts: list[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for part in parts:
        if part["kind"] == "block":
            yield part
            for path in part["paths"]:
                yield from _blocks(path.get("parts", []))
