"""Data of a recipe: problems, worked examples, tokenizer, decontamination."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_parallel_r1.data.embedded.traces import TraceStyle
from megatron_parallel_r1.data.schemas import CUSTOM, Columns, schema_of
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.settings import Count, Settings, Share, Unit


class DataSet(Settings):
    """A data set from the Hub, or from a local copy with the same columns."""

    source: Literal["dataset"]
    """Source: a data set."""
    name: str
    """Name of a known data set (`data/schemas.py`); with `columns` any name on the Hub, or `custom`."""
    path: Path | None = None
    """A parquet or JSON Lines file, or a folder of them, to read instead of the Hub."""
    split: str | None = None
    """Split on the Hub; null: the data set's usual one."""
    columns: Columns | None = None
    """Columns of a data set of your own."""
    limit: Count | None = None
    """Read only the first rows; null: all."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """Rows that cannot be read: refuse the data set, or skip and count them."""
    buffer: Annotated[int, Field(ge=1), Unit("rows")] | None = None
    """Most rows in memory, for files that are too large to hold; null: all."""

    @model_validator(mode="after")
    def _check_schema(self) -> DataSet:
        try:
            schema_of(self.name, self.columns)
        except UserError as error:
            raise ValueError(str(error)) from None
        if self.name == CUSTOM and self.path is None:
            raise ValueError("data set custom: give its path, or its name on the Hub instead of `custom`")
        return self


class EmbeddedProblems(Settings):
    """Congruences that are generated in process."""

    source: Literal["embedded"]
    """Source: embedded problems."""
    kind: Literal["easy", "hard"] = "hard"
    """Difficulty of the problems."""


class EmbeddedArithmetic(Settings):
    """Drills of the arithmetic that the embedded problems need."""

    source: Literal["embedded_arithmetic"]
    """Source: arithmetic drills."""
    easy: Share = 0.3
    """Share of easy problems."""


class EmbeddedColdStart(Settings):
    """Worked examples of the embedded problems, in the style of a solver that guesses."""

    source: Literal["embedded_cold_start"]
    """Source: worked examples."""
    easy: Share = 0.3
    """Share of easy problems."""
    style: TraceStyle = TraceStyle()
    """How the solver searches."""


ProblemSource = Annotated[EmbeddedProblems | DataSet, Field(discriminator="source")]
ExampleSource = Annotated[EmbeddedArithmetic | EmbeddedColdStart | DataSet, Field(discriminator="source")]


class EmbeddedTokenizer(Settings):
    """One token for each word of the embedded curriculum."""

    kind: Literal["embedded"]
    """Tokenizer: that of the embedded curriculum."""


class BpeTokenizer(Settings):
    """A byte-level BPE trained on the texts of data sets."""

    kind: Literal["bpe"]
    """Tokenizer: a BPE trained for this run."""
    vocab_size: Annotated[int, Field(ge=300), Unit("tokens")]
    """Size of the vocabulary, without the tags."""
    texts: tuple[DataSet, ...]
    """Data sets to train on."""


class FolderTokenizer(Settings):
    """The tokenizer of a Hugging Face folder."""

    kind: Literal["folder"]
    """Tokenizer: that of a folder."""
    path: Path | None = None
    """Hugging Face folder; null: `model.path`."""


Tokenizer = Annotated[EmbeddedTokenizer | BpeTokenizer | FolderTokenizer, Field(discriminator="kind")]


class Decontamination(Settings):
    """Removes training problems that overlap with evaluation problems (`data/decontaminate.py`)."""

    against: tuple[DataSet, ...] = ()
    """Data sets to keep apart from, besides the recipe's own evaluation."""
    ngram_size: Annotated[int, Field(ge=1), Unit("words")] = 13
    """Words in a row that two problems must share."""
    max_problems_per_ngram: Count = 10
    """An n-gram in more training problems than this is a stock phrase and is ignored."""
    min_overlap: Share = 0.0
    """Share of an evaluation problem's n-grams at which an overlap counts; 0: one n-gram is enough."""
