"""What a cold start is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError

from megatron_parallel_r1.config.errors import first_problem
from megatron_parallel_r1.data.prompts import TEMPLATES
from megatron_parallel_r1.data.schemas import Columns
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.settings import Thinking

# For pydantic, which reads these settings from a file: an unknown key is an error.
STRICT: dict[str, Any] = {"extra": "forbid"}

Api = Literal["chat", "completions"]


def _check(*rules: tuple[str, bool]) -> None:
    broken = [what for what, holds in rules if not holds]
    if broken:
        raise ValueError("; ".join(broken))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A teacher behind an OpenAI-compatible endpoint.

    Attributes:
        url: what stands before `/chat/completions`, such as `https://api.example.org/v1`.
        api: `chat` sends one user message, `completions` the bare text and a line end.
        key_variable: environment variable that holds the key; None sends none. The key is written nowhere.
        temperature, max_tokens: of a request; None leaves it to the endpoint.
        body: further fields of each request; a null takes a field out, such as `seed` where it is not known.
        timeout_s: for the whole answer to one try.
        retries: tries after the first one, on 408, 409, 425, 429, 5xx, time-outs, lost connections and bodies
            that are no answer.
        backoff_s: the wait before the first retry; it doubles up to `longest_wait_s`. Where the server sends
            a `Retry-After`, that is the least wait, up to an hour.
        give_up_after: requests in a row, none answered after all its tries, that end the run.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    kind: Literal["endpoint"]
    url: str
    model: str
    api: Api = "chat"
    key_variable: str | None = None
    temperature: float | None = 0.8
    max_tokens: int | None = None
    body: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0
    retries: int = 6
    backoff_s: float = 1.0
    longest_wait_s: float = 60.0
    give_up_after: int = 16

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError("url must begin with http:// or https://")
        if "@" in self.url:
            raise ValueError("url must not hold a password; put the key into an environment variable")
        if self.url.rstrip("/").endswith("/completions"):
            raise ValueError("url is what stands before /chat/completions, leave that out")
        _check(
            ("model must be named", bool(self.model.strip())),
            ("temperature must be >= 0", (self.temperature or 0) >= 0),
            ("max_tokens must be >= 1", self.max_tokens is None or self.max_tokens >= 1),
            ("timeout_s must be > 0", self.timeout_s > 0),
            ("retries must be >= 0", self.retries >= 0),
            ("backoff_s must be > 0", self.backoff_s > 0),
            ("longest_wait_s must be >= backoff_s", self.longest_wait_s >= self.backoff_s),
            ("give_up_after must be >= 1", self.give_up_after >= 1),
        )


@dataclass(frozen=True, slots=True)
class OwnEngine:
    """A teacher that our own engine decodes, in parallel, from a Hugging Face folder."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    kind: Literal["engine"]
    path: Path
    thinking: Thinking = field(default_factory=Thinking)


@dataclass(frozen=True, slots=True)
class Problems:
    """A data set of problems with right answers; as `data.readers.read_problems`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: str
    path: Path | None = None
    columns: Columns | None = None
    limit: int | None = None
    bad_rows: Literal["refuse", "skip"] = "refuse"

    def __post_init__(self) -> None:
        _check(("limit must be >= 1", self.limit is None or self.limit >= 1))


@dataclass(frozen=True, slots=True)
class Check:
    """What a trace must be to be kept, besides well-formed and right.

    Attributes:
        parallel: it has a block; off for sequential traces, and for adaptive ones, which may do without.
        independent: no path names a sibling (`references.py`).
        max_chars: of the whole trace.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    parallel: bool = True
    independent: bool = True
    max_chars: int = 20_000

    def __post_init__(self) -> None:
        _check(("max_chars must be >= 1", self.max_chars >= 1))


@dataclass(frozen=True, slots=True)
class Balance:
    """How the kept traces are thinned out (`balance.py`).

    Attributes:
        per_problem: traces of one problem at most.
        ratio: the commonest shape (blocks of a trace, paths of its widest block) may hold at most so many
            times the mean over the shapes that occur; 1 makes all equal, None leaves them as they come.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    per_problem: int = 1
    ratio: float | None = None

    def __post_init__(self) -> None:
        _check(
            ("per_problem must be >= 1", self.per_problem >= 1),
            ("ratio must be >= 1", self.ratio is None or self.ratio >= 1),
        )


@dataclass(frozen=True, slots=True)
class ColdStart:
    """One cold start.

    Attributes:
        out: folder for the journal of answers, `traces.parquet` and the report.
        template: of the prompt (`data/prompts.py`).
        samples: answers asked of each problem in a round.
        enough: traces that pass, different from each other, with which a problem is done.
        rounds: further rounds for the problems that are not, the hard ones.
        concurrency: requests under way at most.
        seed: of the samples, the waits and the balance.
        shown: examples of each reason in the report.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    out: Path
    data: Problems
    teacher: Annotated[Endpoint | OwnEngine, Field(discriminator="kind")]
    template: str = "parallel"
    samples: int = 1
    enough: int = 1
    rounds: int = 3
    concurrency: int = 32
    seed: int = 0
    check: Check = Check()
    balance: Balance = Balance()
    shown: int = 3

    def __post_init__(self) -> None:
        _check(
            (f"template must be one of {', '.join(TEMPLATES)}", self.template in TEMPLATES),
            (
                "template sequential asks for no blocks; set check.parallel: false",
                self.template != "sequential" or not self.check.parallel,
            ),
            ("samples must be >= 1", self.samples >= 1),
            ("enough must be >= 1", self.enough >= 1),
            ("rounds must be >= 0", self.rounds >= 0),
            ("concurrency must be >= 1", self.concurrency >= 1),
            ("seed must be >= 0", self.seed >= 0),
            ("shown must be >= 0", self.shown >= 0),
        )


def settings_of(tree: dict[str, Any], where: str) -> ColdStart:
    """Settings from plain values, as a YAML file has them.

    Args:
        where: names the file in an error.

    Raises:
        UserError: a key is unknown, missing or ill-typed, or a value is not possible.
    """
    try:
        return TypeAdapter(ColdStart).validate_python(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error)}") from None
