r"""Finds training problems that also occur in an evaluation, by shared n-grams of words.

A training problem is contaminated by an evaluation problem if both contain the same 13 consecutive words, as
in GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C). Also from there: an n-gram that more than ten
different training problems contain is a stock phrase ("where m and n are relatively prime positive integers,
find") and is ignored. An evaluation problem shorter than 13 words, or with stock phrases only, matches if a
training problem is the same text up to case, white space, math delimiters ($, \(, \left, …) and the final
punctuation.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.utils.tables import markdown_table

_WORD = re.compile(r"[^\W_]+")
_DELIMITERS = re.compile(r"\$|\\[()\[\],;:! ]|\\(?:left|right|displaystyle)(?![a-z])|\s")
_FINAL_PUNCTUATION = ".?!:"

Ngram = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Overlap:
    """A training problem and an evaluation problem that share n-grams or are the same text.

    Attributes:
        shared: the longest sequence of words that both contain; the whole text if `same`.
        share: the fraction of the evaluation problem's distinctive n-grams that the training problem
            contains; 1 if `same`.
        same: whether they are the same text.
    """

    training: Problem
    evaluation: Problem
    shared: str
    share: float
    same: bool


@dataclass(frozen=True, slots=True)
class Contamination:
    """The overlap of training and evaluation problems.

    Attributes:
        training_count: training problems checked.
        evaluation_count: evaluation problems.
        overlaps: all overlaps, in the order of the training problems.
        stock_phrases: n-grams that too many different training problems contain, and how many do, the most
            frequent first.
    """

    training_count: int
    evaluation_count: int
    overlaps: tuple[Overlap, ...]
    stock_phrases: tuple[tuple[str, int], ...]

    def rows(self) -> frozenset[str]:
        """Returns the ids of the contaminated training problems."""
        return frozenset(overlap.training.id for overlap in self.overlaps)


def find_contamination(
    training: Iterable[Problem],
    evaluation: Sequence[Problem],
    ngram_size: int = 13,
    max_problems_per_ngram: int = 10,
    min_overlap: float = 0.0,
) -> Contamination:
    """Checks the training problems in one pass and keeps only those that share n-grams.

    Args:
        training: the problems of one data set, so that their ids are unique. A problem that repeats, as with
            several worked answers, counts once towards its n-grams; each of its rows may overlap.
        ngram_size: the number of words of an n-gram.
        max_problems_per_ngram: n-grams that more different training problems contain are ignored.
        min_overlap: the smallest share of the evaluation problem's distinctive n-grams that counts as an
            overlap; at 0 one n-gram is enough. The same text always counts.

    Raises:
        ValueError: `ngram_size` or `max_problems_per_ngram` is not positive.
    """
    if ngram_size < 1 or max_problems_per_ngram < 1:
        raise ValueError(
            f"ngram_size {ngram_size} and max_problems_per_ngram {max_problems_per_ngram} must be positive"
        )
    evaluation_ngrams = [frozenset(_ngrams(problem.prompt, ngram_size)) for problem in evaluation]
    problems_with: dict[Ngram, list[int]] = defaultdict(list)
    texts: dict[str, list[int]] = defaultdict(list)
    for index, problem in enumerate(evaluation):
        texts[normalized(problem.prompt)].append(index)
        for ngram in evaluation_ngrams[index]:
            problems_with[ngram].append(index)

    training_count = 0
    occurrences: Counter[Ngram] = Counter()
    counted: set[str] = set()
    suspects: list[tuple[Problem, set[Ngram], list[int]]] = []
    for problem in training:
        training_count += 1
        ngrams = {ngram for ngram in _ngrams(problem.prompt, ngram_size) if ngram in problems_with}
        text = normalized(problem.prompt)
        same = texts.get(text, [])
        # Several answers to one problem are several rows, which must not make a copied problem look common.
        if ngrams and text not in counted:
            counted.add(text)
            occurrences.update(ngrams)
        if ngrams or same:
            suspects.append((problem, ngrams, same))

    distinctive = [
        {ngram for ngram in ngrams if occurrences[ngram] <= max_problems_per_ngram}
        for ngrams in evaluation_ngrams
    ]
    overlaps: list[Overlap] = []
    for problem, ngrams, same in suspects:
        matches = {index for ngram in ngrams for index in problems_with[ngram] if ngram in distinctive[index]}
        for index in sorted(matches.union(same)):
            overlap = _overlap(problem, evaluation[index], ngrams, distinctive[index], index in same)
            if overlap.same or overlap.share >= min_overlap:
                overlaps.append(overlap)
    stock_phrases = [
        (" ".join(ngram), count) for ngram, count in occurrences.items() if count > max_problems_per_ngram
    ]
    stock_phrases.sort(key=lambda entry: (-entry[1], entry[0]))
    return Contamination(training_count, len(evaluation), tuple(overlaps), tuple(stock_phrases))


def contamination_table(contamination: Contamination) -> str:
    """Formats Markdown: a summary, then the overlapping problems and their shared words, the worst first."""
    overlaps = contamination.overlaps
    evaluated = {(overlap.evaluation.source, overlap.evaluation.id) for overlap in overlaps}
    summary = (
        f"{len(contamination.rows())} of {contamination.training_count} training problems overlap with "
        f"{len(evaluated)} of {contamination.evaluation_count} evaluation problems; "
        f"{len(contamination.stock_phrases)} stock phrases ignored."
    )
    if not overlaps:
        return summary + "\n"
    rows = [
        (
            _full_id(overlap.training),
            _full_id(overlap.evaluation),
            "yes" if overlap.same else "no",
            f"{overlap.share:.2f}",
            " ".join(overlap.shared.split()),
        )
        for overlap in sorted(overlaps, key=lambda overlap: (not overlap.same, -overlap.share))
    ]
    titles = ("training problem", "evaluation problem", "same text", "share", "words in common")
    return f"{summary}\n\n{markdown_table(titles, rows, 'lllrl')}\n"


def words_of(text: str) -> list[str]:
    r"""Returns the words and numbers of a text, without case and punctuation; `\frac{1}{2}` is `frac 1 2`."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def normalized(text: str) -> str:
    """Removes what may differ between two copies of a text; keeps signs and operators: `2-3` is not `2+3`."""
    return _DELIMITERS.sub("", unicodedata.normalize("NFKC", text).casefold()).rstrip(_FINAL_PUNCTUATION)


def _ngrams(text: str, length: int) -> Iterator[Ngram]:
    """Yields every `length` consecutive words."""
    words = words_of(text)
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def _overlap(
    training: Problem, evaluation: Problem, ngrams: set[Ngram], distinctive: set[Ngram], same: bool
) -> Overlap:
    if same:
        return Overlap(training, evaluation, evaluation.prompt, 1.0, same)
    share = len(ngrams & distinctive) / len(distinctive)
    return Overlap(training, evaluation, _longest_match(training, evaluation), share, same)


def _longest_match(training: Problem, evaluation: Problem) -> str:
    """Returns the longest sequence of words that both contain."""
    words, others = words_of(evaluation.prompt), words_of(training.prompt)
    match = SequenceMatcher(None, words, others, autojunk=False).find_longest_match()
    return " ".join(words[match.a : match.a + match.size])


def _full_id(problem: Problem) -> str:
    return f"{problem.source} {problem.id}"
