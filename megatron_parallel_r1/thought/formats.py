"""The formats of parallel thinking as data: tags, plan, forced texts, numbers of paths.

A block of any format reads, with [optional parts] in brackets:

    open [plan: begin, items, end]  (path_begin … path_end)+  joined [… summary_end behind]

The policy writes the opening tag and the plan; the engine forks behind them and forces `path_begin` into each
path, `joined` behind all of them, and `behind` after the summary. Forced tokens never carry loss. The number
of paths is set by the recipe, or by the number of items in the plan.

Sources: Parallel-R1 (arXiv 2509.07980), Multiverse (2506.09991), NPR (2512.07461), ThreadWeaver (2512.07843).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

MAX_PATHS = 8
NUMBER = "{number}"


@dataclass(frozen=True)
class PlanSection:
    """A plan that the policy writes before the fork; each complete item asks for one path.

    Attributes:
        item, item_end: tags around an item.
        end: the tag that ends the plan; the engine forks behind it.
        begin: the tag that the items must follow; None: the opening tag of the block is enough.
    """

    item: str
    item_end: str
    end: str
    begin: str | None = None


@dataclass(frozen=True)
class ThinkingFormat:
    """A format of parallel thinking.

    Attributes:
        name: as recipes call it.
        open: the tag with which the policy opens a block.
        path, path_end: tags around a path; the policy writes `path_end`.
        path_begin: the text forced at a path's begin: white space, `path`, and maybe text behind it, in which
            `{number}` stands for the path's number from 1.
        joined: the text forced behind the last path: `close`, `summary`, or one after the other.
        summary, summary_end: tags around the summary; None: the format has no summary.
        behind: the text forced behind `summary_end`; "" for none.
        close: a tag that marks the end of a block or of its paths, in `joined` or `behind`.
        plan: None: the recipe sets the number of paths.
        max_paths: the most paths that a plan may ask for.
        bad_plan: what a plan without items, or with more than `max_paths`, does: the chain goes on without a
            fork (`continue`), or ends there (`end`).

    Raises:
        ValueError: the parts contradict one another.
    """

    name: str
    open: str
    path: str
    path_end: str
    path_begin: str
    joined: str
    summary: str | None = None
    summary_end: str | None = None
    behind: str = ""
    close: str | None = None
    plan: PlanSection | None = None
    max_paths: int = MAX_PATHS
    bad_plan: Literal["continue", "end"] = "continue"

    def __post_init__(self) -> None:
        if fault := _fault(self):
            raise ValueError(f"format {self.name}: {fault}")

    @cached_property
    def roles(self) -> Mapping[str, str]:
        """The tags by what they do, in the order in which a tokenizer gets them; names as of `Tags`."""
        plan = self.plan
        tags: dict[str, str | None] = {
            "parallel": self.open,
            "parallel_end": self.close,
            "plan_begin": plan.begin if plan else None,
            "item": plan.item if plan else None,
            "item_end": plan.item_end if plan else None,
            "plan_end": plan.end if plan else None,
            "path": self.path,
            "path_end": self.path_end,
            "summary": self.summary,
            "summary_end": self.summary_end,
        }
        return MappingProxyType({role: text for role, text in tags.items() if text is not None})

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """The texts of all tags."""
        return tuple(self.roles.values())

    @property
    def fork(self) -> str:
        """The tag behind which the engine forks."""
        return self.plan.end if self.plan else self.open

    def begin_of(self, number: int) -> str:
        """The text forced at the begin of path `number`, from 1."""
        return self.path_begin.replace(NUMBER, str(number))

    def split(self, text: str) -> list[str]:
        """Splits a text at its tags; no piece is empty."""
        return [piece for piece in self._tag.split(text) if piece]

    def split_out(self, text: str) -> list[str]:
        """Cuts the tags out of a text."""
        return self._tag.split(text)[::2]

    def plain_pieces(self) -> Iterator[str]:
        """The pieces of forced texts that are no tags."""
        forced = [*(self.begin_of(number + 1) for number in range(MAX_PATHS)), self.joined, self.behind]
        yield from dict.fromkeys(
            piece for text in forced for piece in self.split(text) if piece not in self.tags
        )

    @cached_property
    def _tag(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, self.tags)) + ")")


def _fault(format: ThinkingFormat) -> str | None:
    """Describes the first contradiction between the parts of a format; None without one."""
    tags = format.tags
    for index, tag in enumerate(tags):
        if not tag.strip() or tag != tag.strip():
            return f"{tag!r} is no tag; give a text without white space around it"
        if other := next((o for at, o in enumerate(tags) if at != index and tag in o), None):
            return f"the tag {tag} is part of {other}; give each tag a text of its own"
    if (format.summary is None) != (format.summary_end is None):
        return "set both of summary and summary_end, or none"
    if not 1 <= format.max_paths <= MAX_PATHS:
        return f"max_paths is {format.max_paths}; give 1 to {MAX_PATHS}"
    lead, _, rest = format.path_begin.partition(format.path)
    if format.path not in format.path_begin or lead.strip() or len(format.split(rest)) > 1 or rest in tags:
        return f"path_begin {format.path_begin!r} must be {format.path} with text behind it alone"
    if rest.count(NUMBER) > 1:
        return f"path_begin {format.path_begin!r} has more than one {NUMBER}"
    ends = [format.split(format.joined), format.split(format.behind)]
    found = [[piece for piece in pieces if piece in tags] for pieces in ends]
    if any(piece.strip() for pieces in ends for piece in pieces if piece not in tags):
        return "joined and behind hold tags, and white space around them"
    if found[0] + found[1] not in _closings(format) or not found[0]:
        return (
            f"joined {format.joined!r} and behind {format.behind!r} must hold close before or behind the "
            "summary, and the summary's tag last in joined"
        )
    if format.summary and found[0][-1:] != [format.summary]:
        return f"joined {format.joined!r} must end with {format.summary}"
    if format.behind and not (format.summary and found[1]):
        return f"behind {format.behind!r} must hold close, behind a summary"
    return None


def _closings(format: ThinkingFormat) -> list[list[str]]:
    """The tags that `joined` and `behind` may hold together."""
    close = [format.close] if format.close else []
    summary = [format.summary] if format.summary else []
    return [close + summary, summary + close]


PARALLEL_R1 = ThinkingFormat(
    name="parallel_r1",
    open="<Parallel>",
    close="</Parallel>",
    path="<Path>",
    path_end="</Path>",
    path_begin="<Path>",
    joined="</Parallel><Summary>",
    summary="<Summary>",
    summary_end="</Summary>",
)
MULTIVERSE = ThinkingFormat(
    name="multiverse",
    open="<Parallel>",
    close="</Parallel>",
    plan=PlanSection("<Outline>", "</Outline>", end="</Goal>", begin="<Goal>"),
    path="<Path>",
    path_end="</Path>",
    path_begin="<Path>{number}:",
    joined="<Conclusion>",
    summary="<Conclusion>",
    summary_end="</Conclusion>",
    behind="</Parallel>",
)
NPR = ThinkingFormat(
    name="npr",
    open="<guideline>",
    plan=PlanSection("<plan>", "</plan>", end="</guideline>"),
    path="<step>",
    path_end="</step>",
    path_begin="\n<step>\n{number}:",
    joined="\n<takeaway>\n",
    summary="<takeaway>",
    summary_end="</takeaway>",
    max_paths=5,
)
THREADWEAVER = ThinkingFormat(
    name="threadweaver",
    open="<Parallel>",
    close="</Parallel>",
    plan=PlanSection("<Outline>", "</Outline>", end="</Outlines>", begin="<Outlines>"),
    path="<Thread>",
    path_end="</Thread>",
    path_begin="<Thread>{number}:",
    joined="</Parallel>",
)
FORMATS: Mapping[str, ThinkingFormat] = MappingProxyType(
    {format.name: format for format in (PARALLEL_R1, MULTIVERSE, NPR, THREADWEAVER)}
)
