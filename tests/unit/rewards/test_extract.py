from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_parallel_r1.rewards.verification import extract_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # The line.
        ("So it is 19.\n\nFinal Answer: 19", "19"),
        ("Final Answer: 3\nNo, wait.\nFinal Answer: 4\n", "4"),
        ("**Final Answer:** 42", "42"),
        ("**Final Answer: 42**", "42"),
        ("### Final answer : $\\frac{1}{2}$", "$\\frac{1}{2}$"),
        ("</Summary>Final Answer: x = 5", "x = 5"),
        ("Final Answer:\n\n  7\n", "7"),
        ("Final Answer:\n\\[\n\\boxed{7}\n\\]", "7"),
        ("Final Answer: 5\nFinal Answer:", "5"),
        # The line against the box.
        (r"We get \boxed{3}. Final Answer: 4", "4"),
        (r"Final Answer: 4. Or \boxed{3}?", "3"),
        ("Final Answer: 4\nThat is \\boxed{3}.", "4"),
        ("Final Answer: the matrix \\boxed{\\begin{pmatrix}\n1 \\\\ 2\n\\end{pmatrix}}", None),
        # The box.
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{\frac{\sqrt{3}}{2^{n+1}}}", r"\frac{\sqrt{3}}{2^{n+1}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"$\boxed 2$.", "2"),
        (r"is \boxed -3.5.", "-3.5"),
        (r"\fbox{9}", "9"),
        (r"$\fbox 9$", "9"),
        (r"\boxed {8}", "8"),
        (r"\boxed{6}, as \boxed{} and \boxed{ } show", "6"),
        # None.
        ("", None),
        ("the final answer is near", None),
        (r"\boxed{}", None),
        (r"\boxed{1", None),
        (r"\boxedly{1}", None),
        ("Final Answer:", None),
        ("}}}{{{", None),
    ],
)
def test_by_hand(text: str, answer: str | None) -> None:
    if answer is None and "pmatrix" in text:
        answer = "\\begin{pmatrix}\n1 \\\\ 2\n\\end{pmatrix}"
    assert extract_answer(text) == answer


LATEX = st.recursive(
    st.text(alphabet="ab12+ ^_\n$", max_size=5) | st.sampled_from([r"\{", r"\}", r"\\", r"\frac"]),
    lambda inner: st.lists(inner, max_size=4).map(lambda parts: "{" + "".join(parts) + "}"),
    max_leaves=20,
)


@given(st.lists(LATEX, max_size=5).map("".join), st.text(alphabet="xyz. $"))
def test_a_box_with_any_balanced_content_comes_out_whole(content: str, around: str) -> None:
    assert extract_answer(f"{around}\\boxed{{{content}}}{around}") == (content.strip() or None)


@given(st.text() | st.lists(st.sampled_from(["\\boxed{", "\\boxed 1", "}", "{", "Final Answer:", "\n", "x"])))
def test_anything_gives_a_clean_answer_or_none(pieces: str | list[str]) -> None:
    answer = extract_answer("".join(pieces))
    assert answer is None or (answer and answer == answer.strip())


@pytest.mark.parametrize(
    "text",
    [
        "{" * 10**6,
        "\\boxed{" * 10**5,
        "\\boxed{" * 10**5 + "}" * 10**5,
        "Final Answer:" * 10**5,
        "\\" * 10**6,
    ],
    ids=["braces", "open boxes", "nested boxes", "markers", "backslashes"],
)
def test_time_is_linear(text: str) -> None:
    start = time.process_time()
    extract_answer(text)
    assert time.process_time() - start < 5.0
