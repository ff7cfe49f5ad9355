"""Prompt templates, in one place: training and evaluation must word the question alike.

`parallel` asks for what Parallel-R1 (arXiv 2509.07980) asks for, in our own words; `sequential` is its
baseline; `plain` is the bare problem, for models that only ever see one kind of question.
"""

from __future__ import annotations

from megatron_parallel_r1.errors import UserError

_FINAL_LINE = "Close with one last line of the form `Final Answer: …` that holds the answer alone."

TEMPLATES = {
    "plain": "{problem}",
    "sequential": f"Solve the following problem step by step. {_FINAL_LINE}\n\nProblem: {{problem}}",
    "parallel": (
        "Solve the following problem step by step. Wherever a step gains from being looked at in "
        "several ways, open a parallel block at that point of your reasoning: write <Parallel>, then "
        "at least two lines of thought, each inside <Path> and </Path>, then </Parallel>. The paths "
        "are independent: none may refer to another or build on its results. Right after the block "
        "write a concise <Summary> … </Summary> of what the paths found and what to go on with, then "
        "continue. Use as many blocks as help, or none. "
        f"{_FINAL_LINE}\n\nProblem: {{problem}}"
    ),
}


def render(template: str, problem: str) -> str:
    """The user message that poses `problem`.

    Raises:
        UserError: no template has that name.
    """
    if template not in TEMPLATES:
        raise UserError(f"prompt template {template!r}: unknown, use one of {', '.join(TEMPLATES)}")
    return TEMPLATES[template].replace("{problem}", problem)
