"""Canonical traces, prompt templates and the last box."""

from __future__ import annotations

import pytest

from megatron_parallel_r1.data.prompts import TEMPLATES, render
from megatron_parallel_r1.data.trace_text import canonical, describe_fault
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.tags import TAG_TEXTS
from megatron_parallel_r1.utils.latex import last_boxes


def test_canonical_closes_the_gaps_that_an_engine_never_leaves() -> None:
    loose = (
        "a\n<Parallel>\n <Path>\nb\n</Path> \n<Path> c </Path>\n</Parallel>\n\n<Summary>\nd\n</Summary>\n\ne"
    )
    tight = "a\n<Parallel><Path>\nb\n</Path><Path> c </Path></Parallel><Summary>\nd\n</Summary>\n\ne"
    assert canonical(loose) == tight
    assert canonical(tight) == tight


def test_canonical_keeps_sampled_gaps() -> None:
    nested = "<Path> <Parallel><Path> </Path></Parallel><Summary> </Summary> </Path>"
    assert canonical(nested) == nested
    assert canonical("</Summary>\n<Parallel>") == "</Summary>\n<Parallel>"


def test_form_is_what_the_parser_says() -> None:
    block = "<Parallel><Path>b</Path><Path>c</Path></Parallel><Summary>d</Summary>"
    assert describe_fault(f"a {block} e {block}") is None
    assert describe_fault("no blocks") is None
    assert describe_fault(block.replace("<Path>b", "First, <Path>b")).startswith("text between the paths")
    assert describe_fault(block.replace("<Summary>", "So ")).startswith("text where <Summary> must follow")
    unclosed = describe_fault(block.removesuffix("</Summary>"))
    assert unclosed.startswith("the trace ends inside a summary, after ")
    assert unclosed.endswith("</Parallel><Summary>d'")


def test_templates_pose_the_problem_and_ask_for_the_final_line() -> None:
    problem = r"Find {x} if \frac{1}{2} + {problem} = $x$."
    assert render("plain", problem) == problem
    for name in ("sequential", "parallel", "adaptive"):
        text = render(name, problem)
        assert text.endswith(problem)
        assert "Final Answer:" in text
    for name in ("parallel", "adaptive"):
        assert all(tag in TEMPLATES[name] for tag in TAG_TEXTS)
    assert not any(tag in TEMPLATES["sequential"] for tag in TAG_TEXTS)


def test_unknown_template() -> None:
    with pytest.raises(UserError, match="'parallell' is no template: use plain"):
        render("parallell", "x")


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} or \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"is $\boxed 9$.", "9"),
        (r"is \fbox{ 7 }", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{3} then cut \boxed{4", "3"),
        (r"\boxed{8}, never \boxed{}", "8"),
        (r"there are \boxed{} primes", None),
        ("nothing", None),
        (r"$k = \boxed{12}$ and $k = \boxed{18}$.", "k = 12$ and $k = 18"),
        (r"$\boxed{(1,2)}$ and $\boxed{(3,4)}$", "(1,2)$ and $(3,4)"),
        (r"is $k = \boxed{5}$ or $k = \boxed{-3}$", "-3"),
        (r"$5!$, or $\boxed{120}$", "120"),
    ],
)
def test_the_answer_of_a_worked_solution(text: str, box: str | None) -> None:
    assert last_boxes(text, alternatives=False) == box
