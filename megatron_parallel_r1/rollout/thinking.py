"""The parallel-thinking loop: writes one trace with any engine.

    chain:  sample until <Parallel>, eos, the chain's own end, or a limit; at <Parallel> write a block, repeat
    block:  where the format has a plan, sample it and count its items: N, or no fork at all;
            N forks each write <Path> and a chain of their own; force </Path> where one was cut;
            join, force </Parallel> <Summary>, sample the summary

The tags here are Parallel-R1's; what is forced where is data (`thought/formats.py`).

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
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_parallel_r1.rollout.draft import Draft, TokenBudget
from megatron_parallel_r1.rollout.engine import (
    Completion,
    Context,
    Engine,
    RecordsExperts,
    Sampling,
    TokenScore,
)
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.thought.parser import parse, planned_paths
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.utils.seeding import hash_seed

End = Literal["eos", "length", "closed"]
# Where a token stands: () the main text, (2,) the closing tags and summary of its second block, (2, 0) that
# block's first path, (2, 0, 1) the first block inside that path, and so on.
Branch = tuple[int, ...]
Observer = Callable[[Branch, int, TokenScore], None]
NOTHING: frozenset[int] = frozenset()
FORCED = TokenScore(0.0)
T = TypeVar("T")


class Thinker(Generic[Context]):
    """Writes traces with one engine and one set of settings.

    Args:
        records_experts: traces have `experts`; the model is a mixture of experts.

    Raises:
        ValueError: the engine is not exact in `settings.mode`.
    """

    def __init__(
        self, engine: Engine[Context], tags: Tags, settings: Thinking, records_experts: bool = False
    ) -> None:
        if settings.mode not in engine.modes:
            raise ValueError(
                f"mode {settings.mode} is not one of the engine's modes: {', '.join(sorted(engine.modes))}"
            )
        self.engine = engine
        self.tags = tags
        self.settings = settings
        self._recorder: RecordsExperts | None = None
        if records_experts:
            assert isinstance(engine, RecordsExperts), "this engine records no experts"
            self._recorder = engine

    async def trace(
        self,
        prompt: Sequence[int],
        opened: Context,
        seed: int,
        paths: int | None = None,
        observe: Observer | None = None,
        alternatives: int = 0,
        at_once: int = 1,
    ) -> Trace:
        """Writes one response after a prompt; closes every context it opened, also when it is cancelled.

        Args:
            prompt: token ids, already written in `opened`.
            opened: a context of the caller; a fork of it is used.
            seed: fixes every draw of this trace.
            paths: sibling paths of its blocks, 1..8; None: as in the settings. A plan overrides both.
            observe: called with each token of the trace and its score (`FORCED` for forced ones), in order
                within a branch. The engine then draws `at_once` tokens a call. Draws of the native engine
                depend on seed and position: the trace is the same.
            alternatives: to each drawn token, in the scores that `observe` gets.
            at_once: most tokens between two calls of `observe`.
        """
        settings = self.settings if paths is None else self.settings.replace(paths=paths)
        budget = TokenBudget(
            settings.max_response_tokens, settings.max_critical_tokens or settings.max_response_tokens
        )
        writing = _Writing(
            self.engine, self.tags, settings, seed, observe, self._recorder, alternatives, at_once
        )
        try:
            draft, end, context = await writing.chain(writing.fork(opened), Draft(), budget, depth=0)
            experts = await writing.experts(context, len(prompt), draft)
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
        recorder: RecordsExperts | None,
        alternatives: int,
        at_once: int,
    ) -> None:
        self.engine = engine
        self.tags = tags
        self.settings = settings
        self.seed = seed
        self._observe = observe
        self._recorder = recorder
        self._alternatives = alternatives
        self._at_once = at_once
        self._open: dict[int, Context] = {}

    def fork(self, context: Context) -> Context:
        return self._keep(self.engine.fork(context))

    def close_all(self) -> None:
        """Closes what is still open: the trace's own context, or all of them after an error."""
        for context in tuple(self._open.values()):
            self._close(context)

    async def experts(self, context: Context, prompt_length: int, draft: Draft) -> bytes:
        """The trace's `experts`; `context` is its last."""
        if self._recorder is None:
            return b""
        count = prompt_length + len(draft)
        flat_TZ = await self._recorder.experts_of(context, count)
        if self.settings.mode != "replay":
            return flat_TZ.tobytes()
        return np.concatenate([_whole(flat_TZ, count), *draft.branches]).tobytes()

    async def chain(
        self, context: Context, draft: Draft, budget: TokenBudget, depth: int, branch: Branch = ()
    ) -> tuple[Draft, End, Context]:
        """Samples the main chain (depth 0) or the inside of a path, blocks included.

        Args:
            context: holds the whole prefix; this call owns it.
            draft: of this chain; a path's begins with its forced tokens.
            budget: for all of `draft`.
            branch: block and path numbers down to this chain; part of the seed of its draws.
        """
        tags, opened, blocks = self.tags, 0, 0
        ends = tags.ends | {tags.path_end} if depth else tags.ends
        while True:
            left = budget.minus(len(draft), draft.critical)
            if left.smallest < 1:
                return draft, "length", context
            # Stop where a block no longer fits: once drawn, `<Parallel>` always has room for one.
            before_block = left.minus(*self._smallest_block(depth, self._most_paths)).smallest
            may_open = (
                self.settings.mode != "sequential"
                and opened < self.settings.max_blocks
                and depth < self.settings.max_depth
                and before_block >= 1
            )
            limit = before_block if may_open else left.smallest
            stop = ends | {tags.parallel} if may_open else ends
            suppress = NOTHING if may_open or not tags.known else frozenset({tags.parallel})
            drawn = await self._sample(context, limit, stop, suppress, branch)
            draft.add_sampled(drawn, suppressed=not may_open)
            if not drawn.stopped:
                continue
            if drawn.tokens[-1] in tags.ends:
                return draft, "eos", context
            if drawn.tokens[-1] == tags.path_end:
                return draft, "closed", context
            opened += 1
            paths: int | End | None = self.settings.paths
            if tags.plan_end is not None:
                paths = await self._plan(context, draft, budget, depth, branch)
            if paths is None and tags.format.bad_plan == "continue":
                continue
            if not isinstance(paths, int):
                return draft, paths or "length", context
            blocks += 1
            end, context = await self._block(context, draft, budget, depth, (*branch, blocks), paths)
            if end != "closed":
                return draft, end, context

    async def _plan(
        self, context: Context, draft: Draft, budget: TokenBudget, depth: int, branch: Branch
    ) -> int | End | None:
        """Writes the plan of a block whose opening tag was just drawn, as a part of its chain.

        Returns:
            The number of paths that it asks for; None if it asks for none or too many; the end of the chain
            where that ended in mid-plan.
        """
        tags, begin = self.tags, len(draft) - 1
        assert tags.plan_end is not None, "a format without plans"
        ends = tags.ends | {tags.path_end} if depth else tags.ends
        left = budget.minus(len(draft), draft.critical)
        limit = left.minus(*self._smallest_block(depth, self._most_paths)).smallest + 1
        drawn = await self._sample(context, limit, ends | {tags.plan_end}, frozenset({tags.parallel}), branch)
        draft.add_sampled(drawn, suppressed=True)
        if not drawn.stopped:
            return "length"
        if drawn.tokens[-1] in ends:
            return "eos" if drawn.tokens[-1] in tags.ends else "closed"
        return planned_paths(draft.tokens[begin:], tags)

    async def _block(
        self, trunk: Context, draft: Draft, budget: TokenBudget, depth: int, branch: Branch, count: int
    ) -> tuple[End, Context]:
        """Writes the `count` paths of a block that forks here, and its summary."""
        engine, tags = self.engine, self.tags
        await engine.write(trunk, ())
        limit = self._path_limit(budget.minus(len(draft), draft.critical), depth, count)
        if self.settings.mode == "causal":
            paths = []
            for index in range(count):
                written = await self._path(trunk, limit, depth + 1, (*branch, index))
                paths.append(written)
                trunk = written[1]
            context = trunk
        else:
            paths = await _gather(
                [self._path(self.fork(trunk), limit, depth + 1, (*branch, index)) for index in range(count)]
            )
            context = await self._joined(trunk, paths)
        draft.add_siblings([path for path, _ in paths])
        await self._force(context, draft, tags.joined, branch)
        if tags.summary_end is None:
            return "closed", context
        end = await self._summary(context, draft, budget, depth, branch)
        if end == "closed":
            await self._force(context, draft, tags.behind, branch)
        elif depth:
            # The enclosing path continues to its own forced end; the text must mark where the summary ended.
            await self._force(context, draft, (tags.summary_end, *tags.behind), branch)
        return end, context

    async def _path(self, context: Context, limit: int, depth: int, branch: Branch) -> tuple[Draft, Context]:
        """Writes one `<Path> … </Path>` to `context`, drawing at most `limit` tokens; returns the context."""
        begin = self.tags.path_begin(branch[-1] + 1)
        draft, budget = Draft(), TokenBudget(len(begin) + limit, len(begin) + limit)
        await self._force(context, draft, begin, branch)
        draft, end, context = await self.chain(context, draft, budget, depth, branch)
        closing = () if end == "closed" else (self.tags.path_end,)
        draft.add_forced(closing, self.engine.version)
        await self.engine.write(context, closing)
        self._show_forced(branch, closing)
        return draft, context

    async def _force(self, context: Context, draft: Draft, tokens: Sequence[int], branch: Branch) -> None:
        """Writes forced tokens, if any."""
        if tokens:
            draft.add_forced(tokens, self.engine.version)
            await self.engine.write(context, tokens)
            self._show_forced(branch, tokens)

    async def _joined(self, trunk: Context, paths: Sequence[tuple[Draft, Context]]) -> Context:
        contexts = [context for _, context in paths]
        if self.settings.mode == "isolated":
            joined = self._keep(self.engine.join(trunk, contexts))
        else:
            joined = self.fork(contexts[0])
            others = [token for draft, _ in paths[1:] for token in draft.tokens]
            if self._recorder is not None:
                for draft, path in paths[1:]:
                    chosen_TZ = await self._recorder.experts_of(path, len(draft))
                    draft.branches.insert(0, _whole(chosen_TZ, len(draft)))
            await self.engine.write(joined, others)
        for context in (trunk, *contexts):
            self._close(context)
        return joined

    async def _summary(
        self, context: Context, draft: Draft, budget: TokenBudget, depth: int, branch: Branch
    ) -> End:
        limit = budget.minus(len(draft), draft.critical).smallest - (depth > 0) - len(self.tags.behind)
        if limit < 1:
            return "length"
        assert self.tags.summary_end is not None, "a format without summaries"
        stop = self.tags.ends | {self.tags.summary_end}
        drawn = await self._sample(context, limit, stop, frozenset({self.tags.parallel}), branch)
        draft.add_sampled(drawn, suppressed=True)
        if not drawn.stopped:
            return "length"
        return "eos" if drawn.tokens[-1] in self.tags.ends else "closed"

    @property
    def _most_paths(self) -> int:
        """The most paths that a block can have."""
        return self.settings.paths if self.tags.format.plan is None else self.tags.format.max_paths

    def _smallest_block(self, depth: int, paths: int) -> tuple[int, int]:
        """Flat and critical tokens after `<Parallel>` of a block whose plan and paths draw one token each.

        A path has its forced begin, its drawn tokens, and maybe a forced `</Path>`; the block ends with
        forced tokens, a nested one maybe with a forced `</Summary>` too.
        """
        tags = self.tags
        path = max(len(tags.path_begin(number + 1)) for number in range(paths)) + 2
        ending = len(tags.joined) + len(tags.behind) + self.settings.reserve_tokens
        ending += (depth > 0 and tags.summary is not None) + (tags.plan_end is not None)
        return path * paths + ending, path + ending

    def _path_limit(self, left: TokenBudget, depth: int, paths: int) -> int:
        """The tokens that each path of a block may draw, once the block forks."""
        flat, critical = self._smallest_block(depth, paths)
        planned = self.tags.plan_end is not None
        spare = left.minus(flat - planned, critical - planned)
        return min(1 + spare.flat // paths, 1 + spare.critical, self.settings.max_path_tokens)

    async def _sample(
        self, context: Context, limit: int, stop: frozenset[int], suppress: frozenset[int], branch: Branch
    ) -> Completion:
        settings = self.settings
        seed = hash_seed(repr((self.seed, branch)))
        sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, seed, self._alternatives)
        if self._observe is None:
            return await self.engine.sample(context, sampling, limit, stop, suppress)
        tokens: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        while True:
            most = min(self._at_once, limit - len(tokens))
            drawn = await self.engine.sample(context, sampling, most, stop, suppress)
            tokens += drawn.tokens
            logprobs += drawn.logprobs
            versions += drawn.versions
            for token, score in zip(drawn.tokens, drawn.scores, strict=True):
                self._observe(branch, token, score)
            if drawn.stopped or len(tokens) == limit:
                return Completion(tuple(tokens), tuple(logprobs), tuple(versions), drawn.stopped)

    def _show_forced(self, branch: Branch, tokens: Sequence[int]) -> None:
        if self._observe is not None:
            for token in tokens:
                self._observe(branch, token, FORCED)

    def _keep(self, context: Context) -> Context:
        self._open[id(context)] = context
        return context

    def _close(self, context: Context) -> None:
        del self._open[id(context)]
        self.engine.close(context)


def _whole(experts_TZ: NDArray[np.int16], count: int) -> NDArray[np.int16]:
    """Fills in the experts of a last token that has none yet: no other token sees it."""
    return np.concatenate([experts_TZ, experts_TZ[-1:]])[:count]


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
