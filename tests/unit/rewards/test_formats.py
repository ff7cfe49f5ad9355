from __future__ import annotations

import pytest

from megatron_parallel_r1.rewards.format_check import Format, well_formed_parallel
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.tree import Tree

TAGS = Tags(parallel=1, parallel_end=2, path=3, path_end=4, summary=5, summary_end=6, eos=0)
NAMES = {"P": 1, "/P": 2, "p": 3, "/p": 4, "S": 5, "/S": 6, "$": 0, "t": 9}


def tree(spelled: str) -> Tree:
    return parse([NAMES[name] for name in spelled.split()], TAGS)


@pytest.mark.parametrize(
    ("spelled", "facts"),
    [
        ("t P p t /p p t /p /P S t /S t $", Format(1, 1, 2, 0)),
        ("P p /p p /p p /p /P S /S t P p /p p /p /P S /S", Format(2, 2, 5, 0)),
        ("P p t P p /p p /p /P S /S /p p /p /P S /S", Format(2, 2, 4, 0)),  # nested
    ],
)
def test_well_formed(spelled: str, facts: Format) -> None:
    assert Format.of(tree(spelled)) == facts
    assert facts.parallel and facts.well_formed and well_formed_parallel(tree(spelled))


@pytest.mark.parametrize(
    ("spelled", "facts"),
    [
        ("t t $", Format(0, 0, 0, 0)),  # sequential
        ("P p t /p /P S t /S", Format(1, 0, 1, 0)),  # one path
        ("P p t /p p t", Format(1, 0, 2, 0)),  # cut in a path
        ("P p t /p p t /p", Format(1, 0, 2, 0)),  # cut before </Parallel>
        ("P p t /p p t /p /P S t", Format(1, 0, 2, 0)),  # cut in the summary
        ("P p t /p p t /p /P t", Format(1, 0, 2, 1)),  # no summary
        ("P p t /p p t /p /P t S t /S", Format(1, 0, 2, 3)),  # a summary too late
        ("P p t /p p t /p /P S t /S S t /S", Format(1, 1, 2, 2)),  # two summaries
        ("P p t /p t p t /p /P S t /S", Format(1, 1, 2, 1)),  # text between the paths
        ("P p t /p p t /p /P S t /S /P", Format(1, 1, 2, 1)),  # a stray tag
        ("P p /p p /p /P S /S P p /p /P S /S", Format(2, 1, 3, 0)),  # the second block has one path
        ("P p t P p /p /P S /S /p p /p /P S /S", Format(2, 1, 3, 0)),  # the nested one has
    ],
)
def test_malformed(spelled: str, facts: Format) -> None:
    assert Format.of(tree(spelled)) == facts
    assert not facts.well_formed and not well_formed_parallel(tree(spelled))


def test_what_the_engine_had_to_close_is_not_well_formed() -> None:
    spelled = tree("P p t /p p t /p /P S t /S")
    sampled = [True] * spelled.length
    assert Format.of(spelled, sampled).well_formed
    for forced in (6, 10):  # the second path's end, the summary's
        flags = [index != forced for index in range(spelled.length)]
        assert Format.of(spelled, flags) == Format(1, 0, 2, 0)
