r"""Finds training problems that an evaluation asks too, by the words that they share.

A training problem counts as contaminated by an evaluation problem if both hold the same 13 words in a row, as
in GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C). From there too: a run of words that more than ten
different training problems hold says nothing ("where m and n are relatively prime positive integers, find")
and is passed over. An evaluation problem shorter than 13 words, or without a telling run, is found if a
training problem is the same text, but for case, white space, the marks of mathematics ($, \(, \left, …) and
the final stop.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from megatron_parallel_r1.data.problems import Problem

_WORD = re.compile(r"[^\W_]+")
_LAYOUT = re.compile(r"\$|\\[()\[\],;:! ]|\\(?:left|right|displaystyle)(?![a-z])|\s")
_FINAL = ".?!:"

Run = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Overlap:
    """A training problem and an evaluation problem that are the same or share words.

    Attributes:
        trained: the training problem.
        asked: the evaluation problem.
        shared: the words in a row that both hold, the longest such run; the whole text if `same`.
        share: of the evaluation problem's telling runs, those that the training problem holds; 1 if `same`.
        same: whether they are the same text.
    """

    trained: Problem
    asked: Problem
    shared: str
    share: float
    same: bool


@dataclass(frozen=True, slots=True)
class Contamination:
    """What training problems and evaluation problems have in common.

    Attributes:
        checked: training problems that were looked at.
        held_out: evaluation problems.
        overlaps: in the order of the training problems.
        passed_over: runs of words that too many different training problems hold, and how many do, the most
            frequent first.
    """

    checked: int
    held_out: int
    overlaps: tuple[Overlap, ...]
    passed_over: tuple[tuple[str, int], ...]

    def rows(self) -> frozenset[str]:
        """Ids of the contaminated training problems."""
        return frozenset(overlap.trained.id for overlap in self.overlaps)


def contamination(
    trained: Iterable[Problem],
    held_out: Sequence[Problem],
    words: int = 13,
    common: int = 10,
    least_share: float = 0.0,
) -> Contamination:
    """Looks at each of `trained` in one pass, and keeps those alone that share words.

    Args:
        trained: of one data set, so that ids tell them apart. A problem that comes several times, as with
            several worked answers, counts as one that holds its runs; each row of it may overlap.
        words: in a run.
        common: a run that more different training problems hold is passed over.
        least_share: an overlap counts from this share of the evaluation problem's telling runs on; at 0 one
            run is enough. The same text always counts.

    Raises:
        ValueError: `words` or `common` is not positive.
    """
    if words < 1 or common < 1:
        raise ValueError(f"runs of {words} words, common beyond {common} problems: both must be positive")
    asked_runs = [frozenset(_runs(problem.prompt, words)) for problem in held_out]
    askers: dict[Run, list[int]] = defaultdict(list)
    texts: dict[str, list[int]] = defaultdict(list)
    for index, problem in enumerate(held_out):
        texts[bare(problem.prompt)].append(index)
        for run in asked_runs[index]:
            askers[run].append(index)

    checked = 0
    holders: Counter[Run] = Counter()
    counted: set[str] = set()
    suspects: list[tuple[Problem, set[Run], list[int]]] = []
    for problem in trained:
        checked += 1
        runs = {run for run in _runs(problem.prompt, words) if run in askers}
        text = bare(problem.prompt)
        same = texts.get(text, [])
        # Several answers to one problem are several rows, which must not make a copied problem look common.
        if runs and text not in counted:
            counted.add(text)
            holders.update(runs)
        if runs or same:
            suspects.append((problem, runs, same))

    telling = [{run for run in runs if holders[run] <= common} for runs in asked_runs]
    overlaps: list[Overlap] = []
    for problem, runs, same in suspects:
        met = {index for run in runs for index in askers[run] if run in telling[index]}
        for index in sorted(met.union(same)):
            overlap = _overlap(problem, held_out[index], runs & telling[index], telling[index], index in same)
            if overlap.same or overlap.share >= least_share:
                overlaps.append(overlap)
    passed_over = [(" ".join(run), count) for run, count in holders.items() if count > common]
    passed_over.sort(key=lambda entry: (-entry[1], entry[0]))
    return Contamination(checked, len(held_out), tuple(overlaps), tuple(passed_over))


def contamination_table(found: Contamination) -> str:
    """Markdown: how much overlaps, then which problems and what they share, the worst first."""
    asked = {(overlap.asked.source, overlap.asked.id) for overlap in found.overlaps}
    summary = (
        f"{len(found.rows())} of {found.checked} training problems overlap with {len(asked)} of "
        f"{found.held_out} evaluation problems; {len(found.passed_over)} common runs of words passed over."
    )
    if not found.overlaps:
        return summary + "\n"
    lines = [
        summary,
        "",
        "| training problem | evaluation problem | same text | share | words in common |",
        "|---|---|---|---:|---|",
    ]
    for overlap in sorted(found.overlaps, key=lambda overlap: (not overlap.same, -overlap.share)):
        problems = f"{_named(overlap.trained)} | {_named(overlap.asked)}"
        shared = " ".join(overlap.shared.split()).replace("|", r"\|")
        lines.append(f"| {problems} | {'yes' if overlap.same else 'no'} | {overlap.share:.2f} | {shared} |")
    return "\n".join(lines) + "\n"


def words_of(text: str) -> list[str]:
    r"""Its words and numbers without case and punctuation; `\frac{1}{2}` is `frac 1 2`."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def bare(text: str) -> str:
    """The text without what may differ between two copies; signs and operators stay, `2-3` is not `2+3`."""
    return _LAYOUT.sub("", unicodedata.normalize("NFKC", text).casefold()).rstrip(_FINAL)


def _runs(text: str, length: int) -> Iterator[Run]:
    """Every `length` words in a row, from first to last."""
    words = words_of(text)
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def _overlap(trained: Problem, asked: Problem, runs: set[Run], telling: set[Run], same: bool) -> Overlap:
    if same:
        return Overlap(trained, asked, asked.prompt, 1.0, same)
    return Overlap(trained, asked, _longest(trained, asked), len(runs) / len(telling), same)


def _longest(trained: Problem, asked: Problem) -> str:
    """The most words in a row that both hold."""
    words, others = words_of(asked.prompt), words_of(trained.prompt)
    match = SequenceMatcher(None, words, others, autojunk=False).find_longest_match()
    return " ".join(words[match.a : match.a + match.size])


def _named(problem: Problem) -> str:
    return f"{problem.source} {problem.id}"
