"""A released model in five lines of Python: load it, pose problems, look at how it thought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from pydantic import ValidationError

from megatron_parallel_r1.data.prompts import decode, encode_prompt
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.report.traces import trace_parts
from megatron_parallel_r1.rewards.verification import extract_answer
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.serve.served_model import ServedModel
from megatron_parallel_r1.serve.session import EngineThread
from megatron_parallel_r1.thought.layout import Mode, critical_length
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.utils.hub import local_folder
from megatron_parallel_r1.utils.settings import first_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class Response:
    """One response. A notebook shows its tree, `print` its text.

    Attributes:
        problem: the text that was posed.
        text: the flat response, with its tags.
        answer: the final answer in it; None: it states none.
        parts: the tree as dictionaries, as `report.traces.trace_parts` describes them: texts, and blocks with
            their paths and summary.
        trace: token ids, log-probs, and the parse.
    """

    problem: str
    text: str
    answer: str | None
    parts: list[dict[str, Any]]
    trace: Trace

    @classmethod
    def of(cls, problem: str, trace: Trace, tokenizer: PreTrainedTokenizerBase) -> Response:
        parts = trace_parts(
            trace.tokens, trace.tree, tokenizer, lambda text: (extract_answer(text), None), trace.sampled
        )
        text = decode(tokenizer, trace.tokens)
        return cls(problem, text, extract_answer(text), parts, trace)

    @property
    def tokens(self) -> int:
        """Tokens of the response, forced tags included."""
        return len(self.trace.tokens)

    @property
    def critical_tokens(self) -> int:
        """Tokens on the critical path: of each block only the longest path counts."""
        return critical_length(self.trace.tree)

    @property
    def blocks(self) -> int:
        """Parallel blocks, nested ones included."""
        return sum(1 for _ in self.trace.tree.all_blocks())

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return (
            f"Response(answer={self.answer!r}, tokens={self.tokens}, critical_tokens={self.critical_tokens}, "
            f"blocks={self.blocks})"
        )

    def _repr_html_(self) -> str:
        rooms = [PackageLoader(f"megatron_parallel_r1.{room}", "templates") for room in ("serve", "report")]
        environment = Environment(loader=ChoiceLoader(rooms), autoescape=True, undefined=StrictUndefined)
        environment.trim_blocks = environment.lstrip_blocks = True
        return environment.get_template("response.html.j2").render(response=self)


class ParallelThinker:
    """A released model that thinks in parallel, decoded in this process by the native engine.

    `generate` may be called from any thread, also inside a running event loop such as a notebook's.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._thread = EngineThread()

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None) -> ParallelThinker:
        """Loads a released folder, such as `runs/tiny/release`, or a downloaded model by its name on the Hub.

        Args:
            device: `cpu`, `cuda` or `cuda:1`; None: the GPU, if there is one.

        Raises:
            UserError: a file is missing or does not match the others.
        """
        return cls(ServedModel.load(local_folder(folder), device=device))

    @property
    def settings(self) -> Thinking:
        """How the model was trained to decode; what `generate` takes where it is given nothing else."""
        return self._model.thinking

    def generate(
        self,
        problems: str | Sequence[str],
        *,
        samples: int = 1,
        paths: int | None = None,
        mode: Mode | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> list[Response]:
        """Returns `samples` responses to each problem, in order.

        Args:
            problems: texts that the prompt template of the training receives.
            paths: sibling paths of a block, 1 to 8; None and so on: as in the training.
            mode: how paths see each other (`thought/layout.py`); `sequential` opens no blocks.
            temperature: 0 is greedy.
            max_tokens: most tokens of a response, those of every path included.
            seed: the same one gives the same responses, whatever else is decoded with them.

        Raises:
            UserError: a setting is out of bounds, or a prompt and its response exceed the model's positions.
        """
        posed = [problems] if isinstance(problems, str) else problems
        posed = [problem for problem in posed for _ in range(samples)]
        if paths is not None and self._model.tags.plan_end is not None:
            raise UserError("paths: this model reads the number of paths from its plans; leave it out")
        named = {"paths": paths, "mode": mode, "temperature": temperature, "max_response_tokens": max_tokens}
        thinking = self._thinking({name: value for name, value in named.items() if value is not None})
        model = self._model
        prompts = [encode_prompt(model.tokenizer, model.template, problem) for problem in posed]
        longest = max(map(len, prompts), default=0) + thinking.max_response_tokens
        if longest > model.positions:
            raise UserError(
                f"prompt and response may have {longest} tokens, the model has {model.positions} positions; "
                "lower max_tokens or shorten the problem"
            )
        thinker = Thinker(model.engine, model.tags, thinking)
        seeds = [seed + index for index in range(len(prompts))]
        traces = self._thread.wait_for(lambda: roll_out(thinker, prompts, seeds))
        return [Response.of(*each, model.tokenizer) for each in zip(posed, traces, strict=True)]

    def _thinking(self, changes: dict[str, Any]) -> Thinking:
        try:
            return self.settings.replace(**changes)
        except ValidationError as error:
            raise UserError(first_problem(error, Thinking)) from None
