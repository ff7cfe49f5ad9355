"""The parallel-thinking loop: writes one trace with any engine.

    chain:  sample until <Parallel>, eos, the chain's own end, or a limit; at <Parallel> write a block, repeat
    block:  N forks each write <Path> and a chain of their own; force </Path> where one was cut;
            join, force </Parallel> <Summary>, sample the summary

Modes differ only in what the paths and the summary see:
- `isolated`: paths are forks, and the join sees their caches.
- `replay`: paths are forks, and the summary sees the flat text: path 1's own context, to which the other
  paths are written again. Exact with any engine that continues a token list.
- `causal`: one path after another in a single context.
- `sequential`: `<Parallel>` is suppressed.

Where `<Parallel>` cannot be drawn (no block left, or none would fit), it is removed from the distribution, in
training too. Suppressed in the rollout alone, it collapsed the training of the embedded curriculum: a wrong
trace lowers what was drawn in the tag's place, which raises the tag, which leaves less to draw from.

Differences from the paper's released loop: sampled end tokens stay in the trace as sampled, forced tags carry
no loss, and after `max_blocks` the trace continues to its answer instead of ending.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from megatron_parallel_r1.rollout.engine import Completion, Context, Engine, RecordsExperts, Sampling
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.utils.seeding import hash_seed

End = Literal["eos", "length", "closed"]
# Where a token stands: () the main text, (2,) the closing tags and summary of its second block, (2, 0) that
# block's first path, (2, 0, 1) the first block inside that path, and so on.
Branch = tuple[int, ...]
Observer = Callable[[Branch, int], None]
NOTHING: frozenset[int] = frozenset()
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """Tokens left for a chain: in the flat text, and on the critical path."""

    flat: int
    critical: int

    @property
    def smallest(self) -> int:
        return min(self.flat, self.critical)

    def minus(self, flat: int, critical: int) -> TokenBudget:
        return TokenBudget(self.flat - flat, self.critical - critical)


@dataclass(slots=True)
class Draft:
    """A chain's flat tokens and their columns; `critical` counts the tokens on its critical path."""

    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    suppressed: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    critical: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def add_forced(self, tokens: Sequence[int], version: int) -> None:
        self.tokens += tokens
        self.sampled += [False] * len(tokens)
        self.suppressed += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)
        self.versions += [version] * len(tokens)
        self.critical += len(tokens)

    def add_sampled(self, completion: Completion, suppressed: bool) -> None:
        self.tokens += completion.tokens
        self.sampled += [True] * len(completion.tokens)
        self.suppressed += [suppressed] * len(completion.tokens)
        self.logprobs += completion.logprobs
        self.versions += completion.versions
        self.critical += len(completion.tokens)

    def add_siblings(self, paths: Sequence[Draft]) -> None:
        for path in paths:
            self.tokens += path.tokens
            self.sampled += path.sampled
            self.suppressed += path.suppressed
            self.logprobs += path.logprobs
            self.versions += path.versions
        self.critical += max(path.critical for path in paths)


class Thinker(Generic[Context]):
    """Writes traces with one engine and one set of settings.

    Raises:
        ValueError: the engine is not exact in `settings.mode`.
    """

    def __init__(self, engine: Engine[Context], tags: Tags, settings: Thinking) -> None:
        if settings.mode not in engine.modes:
            raise ValueError(
                f"mode {settings.mode} is not one of the engine's modes: {', '.join(sorted(engine.modes))}"
            )
        self.engine = engine
        self.tags = tags
        self.settings = settings

    async def trace(
        self,
        prompt: Sequence[int],
        opened: Context,
        seed: int,
        paths: int | None = None,
        observe: Observer | None = None,
    ) -> Trace:
        """Writes one response after a prompt; closes every context it opened, also when it is cancelled.

        Args:
            prompt: token ids, already written in `opened`.
            opened: a context of the caller; a fork of it is used.
            seed: fixes every draw of this trace.
            paths: sibling paths of its blocks, 1..8; None: as in the settings.
            observe: called with each token of the trace, forced ones included, in order within a branch. The
                engine then draws one token a call. Draws depend on seed and position: the trace is the same.
        """
        settings = self.settings if paths is None else self.settings.replace(paths=paths)
        budget = TokenBudget(
            settings.max_response_tokens, settings.max_critical_tokens or settings.max_response_tokens
        )
        writing = _Writing(self.engine, self.tags, settings, seed, observe)
        try:
            draft, end, context = await writing.chain(writing.fork(opened), Draft(), budget, depth=0)
            # The branches of a `replay` row are in contexts of their own.
            engine = self.engine if settings.mode != "replay" else None
            experts = engine.experts_of(context) if isinstance(engine, RecordsExperts) else b""
        finally:
            writing.close_all()
        return Trace(
            prompt=tuple(prompt),
            tokens=tuple(draft.tokens),
            sampled=tuple(draft.sampled),
            suppressed=tuple(draft.suppressed),
            logprobs=tuple(draft.logprobs),
            versions=tuple(draft.versions),
            finish="eos" if end == "eos" else "length",
            tree=parse(draft.tokens, self.tags),
            experts=experts,
        )


class _Writing(Generic[Context]):
    """One trace being written."""

    def __init__(
        self,
        engine: Engine[Context],
        tags: Tags,
        settings: Thinking,
        seed: int,
        observe: Observer | None,
    ) -> None:
        self.engine = engine
        self.tags = tags
        self.settings = settings
        self.seed = seed
        self._observe = observe
        self._open: dict[int, Context] = {}

    def fork(self, context: Context) -> Context:
        return self._keep(self.engine.fork(context))

    def close_all(self) -> None:
        """Closes what is still open: the trace's own context, or all of them after an error."""
        for context in tuple(self._open.values()):
            self._close(context)

    async def chain(
        self, context: Context, draft: Draft, budget: TokenBudget, depth: int, branch: Branch = ()
    ) -> tuple[Draft, End, Context]:
        """Samples the main chain (depth 0) or the inside of a path, blocks included.

        Args:
            context: holds the whole prefix; this call owns it.
            draft: of this chain; a path's begins with `<Path>`.
            budget: for all of `draft`.
            branch: block and path numbers down to this chain; part of the seed of its draws.
        """
        tags, blocks = self.tags, 0
        ends = tags.ends | {tags.path_end} if depth else tags.ends
        while True:
            left = budget.minus(len(draft), draft.critical)
            if left.smallest < 1:
                return draft, "length", context
            # Stop where a block no longer fits: once drawn, `<Parallel>` always has room for one.
            before_block = left.minus(*self._smallest_block(depth)).smallest
            may_open = (
                self.settings.mode != "sequential"
                and blocks < self.settings.max_blocks
                and depth < self.settings.max_depth
                and before_block >= 1
            )
            limit = before_block if may_open else left.smallest
            stop = ends | {tags.parallel} if may_open else ends
            suppress = NOTHING if may_open else frozenset({tags.parallel})
            drawn = await self._sample(context, limit, stop, suppress, branch)
            draft.add_sampled(drawn, suppressed=not may_open)
            if not drawn.stopped:
                continue
            if drawn.tokens[-1] in tags.ends:
                return draft, "eos", context
            if drawn.tokens[-1] == tags.path_end:
                return draft, "closed", context
            blocks += 1
            end, context = await self._block(context, draft, budget, depth, (*branch, blocks))
            if end != "closed":
                return draft, end, context

    async def _block(
        self, trunk: Context, draft: Draft, budget: TokenBudget, depth: int, branch: Branch
    ) -> tuple[End, Context]:
        """Writes the rest of a block whose `<Parallel>` was just drawn, and its summary."""
        engine, tags = self.engine, self.tags
        await engine.write(trunk, ())
        path_budget = self._path_budget(budget.minus(len(draft), draft.critical), depth)
        if self.settings.mode == "causal":
            paths = []
            for index in range(self.settings.paths):
                written = await self._path(trunk, path_budget, depth + 1, (*branch, index))
                paths.append(written)
                trunk = written[1]
            context = trunk
        else:
            paths = await _gather(
                [
                    self._path(self.fork(trunk), path_budget, depth + 1, (*branch, index))
                    for index in range(self.settings.paths)
                ]
            )
            context = await self._joined(trunk, paths)
        draft.add_siblings([path for path, _ in paths])
        await engine.write(context, (tags.parallel_end, tags.summary))
        draft.add_forced((tags.parallel_end, tags.summary), engine.version)
        self._show(branch, (tags.parallel_end, tags.summary))
        end = await self._summary(context, draft, budget, depth, branch)
        if end != "closed" and depth:
            # The enclosing path continues to its own forced end; the text must mark where the summary ended.
            draft.add_forced((tags.summary_end,), engine.version)
            await engine.write(context, (tags.summary_end,))
            self._show(branch, (tags.summary_end,))
        return end, context

    async def _path(
        self, context: Context, budget: TokenBudget, depth: int, branch: Branch
    ) -> tuple[Draft, Context]:
        """Writes one `<Path> … </Path>` to `context`, and returns the context written."""
        draft = Draft()
        draft.add_forced((self.tags.path,), self.engine.version)
        await self.engine.write(context, (self.tags.path,))
        self._show(branch, (self.tags.path,))
        draft, end, context = await self.chain(context, draft, budget, depth, branch)
        closing = () if end == "closed" else (self.tags.path_end,)
        draft.add_forced(closing, self.engine.version)
        await self.engine.write(context, closing)
        self._show(branch, closing)
        return draft, context

    async def _joined(self, trunk: Context, paths: Sequence[tuple[Draft, Context]]) -> Context:
        contexts = [context for _, context in paths]
        if self.settings.mode == "isolated":
            joined = self._keep(self.engine.join(trunk, contexts))
        else:
            joined = self.fork(contexts[0])
            others = [token for draft, _ in paths[1:] for token in draft.tokens]
            await self.engine.write(joined, others)
        for context in (trunk, *contexts):
            self._close(context)
        return joined

    async def _summary(
        self, context: Context, draft: Draft, budget: TokenBudget, depth: int, branch: Branch
    ) -> End:
        limit = budget.minus(len(draft), draft.critical).smallest - (depth > 0)
        if limit < 1:
            return "length"
        stop = self.tags.ends | {self.tags.summary_end}
        drawn = await self._sample(context, limit, stop, frozenset({self.tags.parallel}), branch)
        draft.add_sampled(drawn, suppressed=True)
        if not drawn.stopped:
            return "length"
        return "eos" if drawn.tokens[-1] in self.tags.ends else "closed"

    def _smallest_block(self, depth: int) -> tuple[int, int]:
        """Flat and critical tokens after `<Parallel>` of a block whose paths draw one token each.

        A path has `<Path>`, its drawn tokens, and maybe a forced `</Path>`; the block ends with two tags, a
        nested one maybe with a forced `</Summary>` too.
        """
        ending = 2 + (depth > 0) + self.settings.reserve_tokens
        return 3 * self.settings.paths + ending, 3 + ending

    def _path_budget(self, left: TokenBudget, depth: int) -> TokenBudget:
        """The budget of each path of a block that begins now: `<Path>` and what the path may draw."""
        flat, critical = self._smallest_block(depth)
        spare = left.minus(flat, critical)
        drawn = min(1 + spare.flat // self.settings.paths, 1 + spare.critical, self.settings.max_path_tokens)
        return TokenBudget(1 + drawn, 1 + drawn)

    async def _sample(
        self, context: Context, limit: int, stop: frozenset[int], suppress: frozenset[int], branch: Branch
    ) -> Completion:
        settings = self.settings
        seed = hash_seed(repr((self.seed, branch)))
        sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, seed)
        if self._observe is None:
            return await self.engine.sample(context, sampling, limit, stop, suppress)
        tokens: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        while True:
            drawn = await self.engine.sample(context, sampling, 1, stop, suppress)
            tokens += drawn.tokens
            logprobs += drawn.logprobs
            versions += drawn.versions
            self._show(branch, drawn.tokens)
            if drawn.stopped or len(tokens) == limit:
                return Completion(tuple(tokens), tuple(logprobs), tuple(versions), drawn.stopped)

    def _show(self, branch: Branch, tokens: Sequence[int]) -> None:
        if self._observe is not None:
            for token in tokens:
                self._observe(branch, token)

    def _keep(self, context: Context) -> Context:
        self._open[id(context)] = context
        return context

    def _close(self, context: Context) -> None:
        del self._open[id(context)]
        self.engine.close(context)


async def _gather(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order. An error cancels the other coroutines before their contexts are closed."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def roll_out(
    thinker: Thinker[Any],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    concurrent: int = 256,
    paths: Sequence[int] | None = None,
    on_trace: Callable[[int, Trace], None] | None = None,
) -> list[Trace]:
    """One trace for each (prompt, seed), in order.

    Equal prompts are written once and shared; a prompt is closed after its last trace.

    Args:
        concurrent: maximum traces in flight.
        paths: sibling paths of each trace's blocks; None: as in the settings.
        on_trace: called in another thread with the index and the trace as soon as it is complete, while the
            others continue.
    """
    engine = thinker.engine
    slots = asyncio.Semaphore(concurrent)
    opened: dict[tuple[int, ...], asyncio.Task[Any]] = {}
    left = Counter(map(tuple, prompts))

    async def write_prompt(prompt: tuple[int, ...]) -> Any:
        context = engine.open()
        await engine.write(context, prompt)
        return context

    async def roll_out_one(index: int) -> Trace:
        prompt = tuple(prompts[index])
        async with slots:
            if prompt not in opened:
                opened[prompt] = asyncio.ensure_future(write_prompt(prompt))
            context = await opened[prompt]
            trace = await thinker.trace(prompt, context, seeds[index], paths[index] if paths else None)
            left[prompt] -= 1
            if not left[prompt]:
                del opened[prompt]
                engine.close(context)
        if on_trace is not None:
            await asyncio.to_thread(on_trace, index, trace)
        return trace

    try:
        return list(await asyncio.gather(*(roll_out_one(index) for index in range(len(prompts)))))
    finally:
        for writing in opened.values():
            engine.close(await writing)
