"""What a recipe says of data: where problems and examples come from, what is kept out, which tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_parallel_r1.data.embedded.traces import TraceStyle
from megatron_parallel_r1.data.schemas import CUSTOM, Columns, schema_of
from megatron_parallel_r1.errors import UserError


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class DataSet(Strict):
    """A data set by its name, from the Hub or from a local copy of the same schema.

    Attributes:
        name: of a set that we know (`data.schemas`); with `columns` any name on the Hub, or `custom`.
        path: a parquet or JSON Lines file to read instead of the Hub, or a folder of them.
        split: on the Hub; the set's usual one if None.
        columns: which hold what, in a set of the user's own.
        buffer: problems or examples in memory at most, for files too large to hold; None: all.
    """

    source: Literal["dataset"]
    name: str
    path: Path | None = None
    split: str | None = None
    columns: Columns | None = None
    limit: Count | None = None
    bad_rows: Literal["refuse", "skip"] = "refuse"
    buffer: Count | None = None

    @model_validator(mode="after")
    def _known(self) -> DataSet:
        try:
            schema_of(self.name, self.columns)
        except UserError as error:
            raise ValueError(str(error)) from None
        if self.name == CUSTOM and self.path is None:
            raise ValueError("data set custom: give its path, or its name on the Hub instead of `custom`")
        return self


class EmbeddedProblems(Strict):
    """Congruences made in process."""

    source: Literal["embedded"]
    kind: Literal["easy", "hard"] = "hard"


class EmbeddedArithmetic(Strict):
    """Drills of the arithmetic that the embedded problems need; `easy` is the share of easy ones."""

    source: Literal["embedded_arithmetic"]
    easy: Share = 0.3


class EmbeddedColdStart(Strict):
    """Worked examples of the embedded problems, in the style of a solver that guesses."""

    source: Literal["embedded_cold_start"]
    easy: Share = 0.3
    style: TraceStyle = TraceStyle()


ProblemSource = Annotated[EmbeddedProblems | DataSet, Field(discriminator="source")]
ExampleSource = Annotated[EmbeddedArithmetic | EmbeddedColdStart | DataSet, Field(discriminator="source")]


class EmbeddedTokenizer(Strict):
    """One token a word of the embedded curriculum."""

    kind: Literal["embedded"]


class BpeTokenizer(Strict):
    """A byte-level BPE trained on the texts of the data sets named here."""

    kind: Literal["bpe"]
    vocab_size: Annotated[int, Field(ge=300)]
    texts: tuple[DataSet, ...]


class FolderTokenizer(Strict):
    """A Hugging Face folder, or `model.path` if none is given."""

    kind: Literal["folder"]
    path: Path | None = None


Tokenizer = Annotated[EmbeddedTokenizer | BpeTokenizer | FolderTokenizer, Field(discriminator="kind")]


class Decontamination(Strict):
    """Leaves out training problems that overlap with evaluation problems (`data.decontaminate`).

    Attributes:
        against: data sets to keep apart from, besides the recipe's own evaluation.
        ngram_size, max_problems_per_ngram, min_overlap: `words`, `common` and `least_share` of
            `data.decontaminate.contamination`.
    """

    against: tuple[DataSet, ...] = ()
    ngram_size: Count = 13
    max_problems_per_ngram: Count = 10
    min_overlap: Share = 0.0
