"""Data of a recipe: problems, worked examples, tokenizer, decontamination."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_parallel_r1.data.embedded.traces import TraceStyle
from megatron_parallel_r1.data.readers import ReadOptions
from megatron_parallel_r1.data.schemas import CUSTOM, Columns, schema_of
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.hub import local_folder
from megatron_parallel_r1.utils.settings import Count, Settings, Share, Unit


class DataSetFiles(Settings):
    """A data set from the Hub, or from a local copy with the same columns."""

    name: str
    """Name of a known data set (`data/schemas.py`); with `columns` any name on the Hub, or `custom`."""
    path: Path | None = None
    """File or folder to read instead of the Hub: parquet, Arrow, CSV, JSON Lines or arrays, also compressed;
    what `save_to_disk` wrote; a clone of the Hub."""
    config: str | None = None
    """Configuration on the Hub or of a clone; null: the data set's usual one."""
    split: str | None = None
    """Split on the Hub or of a folder whose names say it; null: the data set's usual one."""
    columns: Columns | None = None
    """Columns of a data set of your own."""
    drop_repeats: bool | None = None
    """Drop rows that repeat a problem, and every copy of one whose copies contradict each other; null: as is
    usual for the data set, for your own false. Both are counted in any case."""
    limit: Count | None = None
    """Read only the first rows; null: all."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """Rows that cannot be read: refuse the data set, or skip and count them."""

    @model_validator(mode="after")
    def _check_schema(self) -> DataSetFiles:
        try:
            schema_of(self.name, self.columns)
        except UserError as error:
            raise ValueError(str(error)) from None
        if self.name == CUSTOM and self.path is None:
            raise ValueError("data set custom: give its path, or its name on the Hub instead of `custom`")
        return self

    def read_options(self, fields: Sequence[str] = ()) -> ReadOptions:
        """Returns the options of `data.readers`; `fields` are the columns that the prompt template shows."""
        return {
            "columns": self.columns,
            "split": self.split,
            "config": self.config,
            "fields": fields,
            "drop_repeats": self.drop_repeats,
            "limit": self.limit,
            "bad_rows": self.bad_rows,
        }


class DataSet(DataSetFiles):
    """A data set from the Hub, or from a local copy with the same columns."""

    source: Literal["dataset"]
    """Source: a data set."""
    buffer: Annotated[int, Field(ge=1), Unit("rows")] | None = None
    """Most rows in memory, for files that are too large to hold; null: all."""


class MixedDataSet(DataSet):
    """A data set of a mixture."""

    source: Literal["dataset"] = "dataset"
    """Source: a data set."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of the draws, relative to the other weights; the size of the data set has no influence."""
    label: str | None = None
    """Name in metrics by source; null: `columns.source` of each row, or else `name`."""

    def read_options(self, fields: Sequence[str] = ()) -> ReadOptions:
        return {**super().read_options(fields), "label": self.label}


class Mixture(Settings):
    """Several data sets, drawn in proportion to their weights; metrics are also given for each source."""

    source: Literal["mixture"]
    """Source: a mixture."""
    sets: Annotated[tuple[MixedDataSet, ...], Field(min_length=1)]
    """Data sets."""

    @model_validator(mode="after")
    def _check_labels(self) -> Mixture:
        labels = [data.label or data.name for data in self.sets]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"two sets of the mixture are called {twice}; give each a label of its own")
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


class DistilledTraces(Settings):
    """The traces that a `distill` stage of the recipe has kept."""

    source: Literal["distilled"]
    """Source: traces of an earlier stage."""
    stage: str
    """Name of that stage."""


ProblemSource = Annotated[EmbeddedProblems | DataSet | Mixture, Field(discriminator="source")]
ExampleSource = Annotated[
    EmbeddedArithmetic | EmbeddedColdStart | DistilledTraces | DataSet | Mixture,
    Field(discriminator="source"),
]


def data_sets(source: Settings) -> tuple[DataSet, ...]:
    """Returns the data sets of a source: one, those of a mixture, or none of embedded problems."""
    if isinstance(source, Mixture):
        return source.sets
    return (source,) if isinstance(source, DataSet) else ()


def has_sources(source: Settings) -> bool:
    """Returns whether metrics are also reported by source."""
    return isinstance(source, Mixture) or any(
        data.columns is not None and data.columns.source is not None for data in data_sets(source)
    )


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
    """Hugging Face folder, or the Hub's name of a downloaded model; null: `model.path`."""

    @property
    def folder(self) -> Path | None:
        """The folder of `path` on this machine."""
        return None if self.path is None else local_folder(self.path)


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
