"""Settings of a cold start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_parallel_r1.config.data import DataSetFiles
from megatron_parallel_r1.config.selection import Balance, Check
from megatron_parallel_r1.data.prompts import template_text
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.thought.format_settings import FormatSetting
from megatron_parallel_r1.utils.settings import (
    Count,
    CountOrZero,
    Seconds,
    Settings,
    Tokens,
)

Api = Literal["chat", "completions"]


class TeacherEndpoint(Settings):
    """A teacher behind an OpenAI-compatible endpoint."""

    kind: Literal["endpoint"]
    """Teacher: an endpoint."""
    url: str
    """URL before `/chat/completions`, such as `https://api.example.org/v1`."""
    model: str
    """Name of the model at the endpoint."""
    api: Api = "chat"
    """`chat` sends one user message, `completions` the bare text and a newline."""
    key_variable: str | None = None
    """Environment variable that holds the API key, which is written nowhere; null: no key is sent."""
    temperature: Annotated[float, Field(ge=0)] | None = 0.8
    """Sampling temperature of a request; null: the endpoint's default."""
    max_tokens: Tokens | None = None
    """Token limit of a request; null: the endpoint's default."""
    body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of each request; a null removes a field, such as `seed` where it is not supported."""
    timeout_s: Seconds = 600.0
    """Timeout of one attempt, for the whole answer."""
    retries: CountOrZero = 6
    """Retries on 408, 409, 425, 429, 5xx, timeouts, lost connections and bodies that are no answer."""
    backoff_s: Seconds = 1.0
    """Wait before the first retry; it doubles up to `longest_wait_s`. A server's `Retry-After` is the
    shortest wait, up to an hour."""
    longest_wait_s: Seconds = 60.0
    """Longest wait before a retry."""
    give_up_after: Count = 16
    """Consecutive requests without an answer, all retries used, that end the run."""

    @model_validator(mode="after")
    def _check_url(self) -> TeacherEndpoint:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError("url must begin with http:// or https://")
        if "@" in self.url:
            raise ValueError("url must not hold a password; put the key into an environment variable")
        if self.url.rstrip("/").endswith("/completions"):
            raise ValueError("url ends before /chat/completions; leave that out")
        if not self.model.strip():
            raise ValueError("model must be named")
        if self.longest_wait_s < self.backoff_s:
            raise ValueError("longest_wait_s must be >= backoff_s")
        return self


class OwnEngine(Settings):
    """A teacher in a Hugging Face folder that the native engine decodes, in parallel."""

    kind: Literal["engine"]
    """Teacher: the native engine."""
    path: Path
    """Hugging Face folder of the teacher, or the Hub's name of a downloaded one."""
    thinking: Thinking = Thinking()
    """How the teacher decodes."""


class ColdStart(Settings):
    """One cold start."""

    out: Path
    """Folder for the journal of answers, `traces.parquet` and the report."""
    data: DataSetFiles
    """Problems to solve."""
    teacher: Annotated[TeacherEndpoint | OwnEngine, Field(discriminator="kind")]
    """Model that writes the traces."""
    template: str = "parallel"
    """Prompt template: a name of `data/prompts.py`, or a text with `{problem}` in it."""
    format: FormatSetting = "parallel_r1"
    """Format of the traces: `parallel_r1`, `multiverse`, `npr`, `threadweaver`, or a mapping with one of your
    own."""
    samples: Count = 1
    """Answers requested for each problem in a round."""
    enough: Count = 1
    """Different traces that pass, with which a problem is done."""
    rounds: CountOrZero = 3
    """Further rounds for problems that are not done, the hard ones."""
    concurrency: Count = 32
    """Most requests in flight."""
    seed: CountOrZero = 0
    """Seed of the samples, the waits and the balance."""
    check: Check = Check()
    """Conditions under which a trace is kept."""
    balance: Balance = Balance()
    """Balancing of the kept traces."""
    shown: CountOrZero = 3
    """Examples of each reason for rejection in the report."""

    @model_validator(mode="after")
    def _check_template(self) -> ColdStart:
        try:
            template_text(self.template)
        except UserError as error:
            raise ValueError(str(error)) from None
        if self.template == "sequential" and self.check.parallel:
            raise ValueError("template sequential asks for no blocks; set check.parallel: false")
        if self.format != "parallel_r1" and self.template in ("parallel", "adaptive"):
            raise ValueError(
                f"template {self.template} describes the tags of parallel_r1, and format is another; write a "
                "text of your own with {problem} in it, or use plain"
            )
        return self
