"""Generators of the curriculum's problems and examples, and its tokenizer.

Each item is a pure function of seed and index, so a stream resumes from its position alone.
"""

from __future__ import annotations

import random
from dataclasses import astuple, replace
from itertools import islice
from typing import TYPE_CHECKING

from megatron_parallel_r1.data.embedded.congruence import (
    MODULUS,
    Congruence,
    Difficulty,
    reduced_forms,
    vocabulary,
)
from megatron_parallel_r1.data.embedded.traces import TraceStyle, in_format, write_drill, write_trace
from megatron_parallel_r1.data.problems import Example, Problem
from megatron_parallel_r1.data.tokenizers import BOS, EOS, PAD, UNK, as_hf
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.formats import MAX_PATHS, PARALLEL_R1, ThinkingFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SOURCE = "embedded"


def as_problem(congruence: Congruence) -> Problem:
    """Converts to a problem whose answers are all solutions."""
    return Problem(
        id="-".join(map(str, astuple(congruence))),
        prompt=congruence.question,
        answers=tuple(map(str, congruence.roots)),
        source=SOURCE,
    )


def training_problem(kind: Difficulty, seed: int, index: int) -> Problem:
    """Returns problem `index` of an endless stream without held-out problems."""
    return as_problem(_draw(kind, random.Random(f"problem/{seed}/{index}")))


def cold_start_example(
    style: TraceStyle, easy: float, seed: int, index: int, format: ThinkingFormat = PARALLEL_R1
) -> Example:
    """Returns worked example `index` of an endless stream; a share `easy` of its problems is easy."""
    rng = random.Random(f"cold start/{seed}/{index}")
    congruence = _draw("easy" if rng.random() < easy else "hard", rng)
    return Example(as_problem(congruence), in_format(write_trace(congruence, style, rng), format))


def arithmetic_example(easy: float, seed: int, index: int) -> Example:
    """Returns drill `index` of an endless stream over training problems, without tags."""
    rng = random.Random(f"arithmetic/{seed}/{index}")
    congruence = _draw("easy" if rng.random() < easy else "hard", rng)
    return Example(as_problem(congruence), write_drill(congruence, rng))


def evaluation_problems(kind: Difficulty, count: int) -> tuple[Problem, ...]:
    """Returns the first `count` held-out problems in a fixed order.

    No reduced form repeats before all (552 hard, 39 easy) have occurred once.

    Raises:
        UserError: fewer are held out (7176 hard, 507 easy).
    """
    forms = list(reduced_forms(kind, held_out=True))
    if count > len(forms) * MODULUS:
        raise UserError(
            f"embedded {kind} evaluation: {count} problems wanted, {len(forms) * MODULUS} are held out"
        )
    rng = random.Random(f"evaluation/{kind}")
    rng.shuffle(forms)
    constants = [rng.sample(range(MODULUS), MODULUS) for _ in forms]
    laps = (zip(forms, constant, strict=True) for constant in zip(*constants, strict=True))
    order = (_with_constant(form, d) for lap in laps for form, d in lap)
    return tuple(as_problem(congruence) for congruence in islice(order, count))


def _draw(kind: Difficulty, rng: random.Random) -> Congruence:
    form = rng.choice(reduced_forms(kind, held_out=False))
    return _with_constant(form, rng.randrange(MODULUS))


def _with_constant(form: Congruence, d: int) -> Congruence:
    return replace(form, d=d, c=(form.need + d) % MODULUS)


def build_tokenizer(format: ThinkingFormat = PARALLEL_R1) -> PreTrainedTokenizerFast:
    """Builds a tokenizer that splits only at white space, without the tags of the format.

    `thought.tokenizer.add_tags` adds the tags. Decoding joins words with spaces; `trace_text.canonical` then
    restores the text of a trace.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = [PAD, BOS, EOS, UNK, *vocabulary()]
    if format != PARALLEL_R1:
        forced = [word for piece in format.plain_pieces() for word in piece.split()]
        numbers = [f"{number + 1}:" for number in range(MAX_PATHS)] if format.plan else []
        words = list(dict.fromkeys([*words, *forced, *numbers]))
    tokenizer = Tokenizer(WordLevel({word: id for id, word in enumerate(words)}, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return as_hf(tokenizer)
