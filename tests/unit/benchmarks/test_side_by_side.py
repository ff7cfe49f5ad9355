from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.page import Table, publish, replace_section
from benchmarks.side_by_side import alternate, ratios, spread


def test_calls_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def call(name: str, value: float) -> float:
        order.append(name)
        return value + len(order)

    found = alternate({"a": lambda: call("a", 0), "b": lambda: call("b", 100)}, repeats=2)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [4, 5], "b": [103, 106]}


def test_a_ratio_is_taken_within_each_repeat() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert spread([3.0, 1.0, 2.0], ".1f") == "2.0 (1.0 to 3.0)"


def test_each_benchmark_has_its_section_of_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "performance.md"
    publish("first", [Table("One", ["a", "b"], [["1", "2"]], "Said.")], "a machine", write=False, page=page)
    assert not page.exists() and "| 1 | 2 |" in capsys.readouterr().out
    for name in ("first", "second"):
        publish(name, [Table("One", ["a", "b"], [[name, "2"]])], "a machine", write=True, page=page)
    page.write_text(page.read_text() + "\nAfter.\n")
    replace_section(page, "first", "anew")
    text = page.read_text()
    assert (
        text.index("anew") < text.index("| second | 2 |") < text.index("After.") and "| first |" not in text
    )


def test_each_benchmark_of_a_run_exists(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(run.__file__).parent
    assert run.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(run.ALL)
    for benchmark, line in zip(run.ALL, lines, strict=True):
        source = (folder / f"{benchmark.module}.py").read_text()
        assert f"-m benchmarks.{benchmark.module} " in line and "add_write_option(" in source
