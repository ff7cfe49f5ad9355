"""Who decodes for a stage: an engine in these processes, or servers that follow the trainer's weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.rollout import Rollout
from megatron_parallel_r1.distributed.collectives import all_gather_objects, run_on_rank_zero
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.rollout.engine import Engine
from megatron_parallel_r1.rollout.native import limits
from megatron_parallel_r1.rollout.servers.client import Timeouts
from megatron_parallel_r1.rollout.servers.connect import check_checkpoint, met_pool
from megatron_parallel_r1.rollout.servers.engine import ServerEngine
from megatron_parallel_r1.rollout.servers.pool import Pool, PoolSettings
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.run.context import Workbench, native_engine
from megatron_parallel_r1.run.own_servers import OwnServers
from megatron_parallel_r1.run.save import save_model
from megatron_parallel_r1.sync.control import Control, Row, Scores
from megatron_parallel_r1.sync.probe import Head
from megatron_parallel_r1.sync.publisher import Published, Publisher
from megatron_parallel_r1.sync.sglang import SglangControl, check_copies
from megatron_parallel_r1.sync.vllm import VllmControl
from megatron_parallel_r1.train.logprob_runner import Scorer
from megatron_parallel_r1.train.probing import causal_logprobs, probe_texts


class Decoder(Protocol):
    """An engine, and what the training loop tells and asks of it beside the engine's own calls."""

    @property
    def engine(self) -> Engine[Any]: ...

    def rest(self) -> None:
        """The batch is there: what decodes may give its memory back until the next weights come."""
        ...

    def metrics(self) -> dict[str, float]:
        """For the step log, since the last call; all processes call it."""
        ...


class Native:
    """Decodes in these processes."""

    def __init__(self, bench: Workbench, team: dist.ProcessGroup | None) -> None:
        self.engine = native_engine(bench.shape, team, bench.recipe.rollout.compiled)

    def rest(self) -> None:
        return None

    def metrics(self) -> dict[str, float]:
        return {}


class Served:
    """Rollout servers, which have a model's weights when they are published."""

    def __init__(self, pool: Pool, publisher: Publisher, asked: Rollout) -> None:
        self.engine = ServerEngine(pool, self._publish)
        self._pool, self._publisher, self._asked = pool, publisher, asked
        self._published: Published | None = None
        self._known = set(pool.abouts)
        self._resting = False

    def rest(self) -> None:
        if self._asked.colocated:
            self._publisher.release()
            self._resting = True

    def end(self) -> None:
        """Leaves the servers awake, with the last weights: whoever comes next asks them first of all."""
        if self._resting:
            self._publish((), self.engine.version + 1)
        self._publisher.end()

    def metrics(self) -> dict[str, float]:
        each = all_gather_objects(self._pool.metrics())
        counts = {name: sum(one[name] for one in each) for name in each[0]}
        counts["server_cached_share"] /= len(each)
        for name in ("servers_up", "servers_unseeded", "servers_lost"):
            counts[name] = each[0][name]
        if self._published is None:
            return counts
        sent = self._published
        return counts | {
            "sync_time_s": sent.seconds,
            "sync_mb_s": sent.bytes / 1e6 / sent.seconds,
            "sync_difference": sent.difference,
        }

    def _publish(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """The publisher takes the weights from where they are, so nobody asks `tensors` for any."""
        if self._resting:
            self._publisher.resume()
            self._resting = False
        urls = set(self._pool.abouts)
        for url in self._known - urls:
            self._publisher.remove(url)
        for url in urls - self._known:
            self._publisher.add(_control(self._asked, url))
        self._known = urls
        self._published = self._publisher.publish(version)
        self._pool.published(version, self._published.in_step)


class Decoders:
    """Opens the decoder that a recipe names; servers that the run starts itself last as long as this."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        logs = bench.folder / "servers"
        self._own = OwnServers(bench.recipe.rollout, logs, lambda line: print(line, flush=True))

    def __enter__(self) -> Decoders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._own.__exit__(kind, error, trace)

    @contextmanager
    def of(
        self, model: Model, thinking: Thinking, team: dist.ProcessGroup | None = None
    ) -> Iterator[Decoder]:
        """A decoder that has no weights of the model yet.

        Args:
            team: the tensor group once more, for an engine of a second thread.

        Raises:
            UserError: no server answers, they do not decode in `thinking.mode`, or one could take no weights.
        """
        asked = self._bench.recipe.rollout
        if asked.engine == "native":
            yield Native(self._bench, team)
            return
        urls = asked.urls or (self._started(model, thinking) if asked.servers else ())
        pool = _shared_pool(asked, urls, thinking)
        for url, about in pool.abouts.items():
            check_copies(url, about.copies, asked.sync.transport)
        controls = [_control(asked, url) for url in pool.abouts]
        publisher = Publisher(
            controls, model, asked.sync, probe_texts(self._bench.shape.vocab), _Expected(model, self._bench)
        )
        served = Served(pool, publisher, asked)
        try:
            yield served
        except BaseException:
            # Others may be gone: nothing that waits for them.
            for control in controls:
                control.close()
            raise
        served.end()

    def _started(self, model: Model, thinking: Thinking) -> tuple[str, ...]:
        """Servers of this run. They begin with the model as it is now, and soon get its next weights."""
        folder = self._bench.folder / "servers" / "model"
        if not folder.is_dir():
            save_model(self._bench, model, folder)
        return run_on_rank_zero(lambda: self._own.urls(folder, thinking.mode == "isolated"))


class _Expected:
    """The trainer's log-probs for the probe."""

    def __init__(self, model: Model, bench: Workbench) -> None:
        self._model, self._capacity = model, bench.recipe.max_tokens_per_micro_batch

    def __call__(self, rows: Sequence[Row], head: Head | None) -> Sequence[Scores]:
        scorer = Scorer(self._model, head_VE=head.rows_VE if head else None)
        return causal_logprobs(scorer, rows, self._capacity)


@contextmanager
def engine_of_checkpoint(recipe: Recipe, folder: Path, thinking: Thinking) -> Iterator[Engine[Any]]:
    """The recipe's engine with the weights of a folder; servers that run already must hold just those.

    Raises:
        UserError: the folder is no checkpoint, or the engine cannot decode it as `thinking` says.
    """
    asked = recipe.rollout
    if asked.engine == "native":
        limits.refuse(recipe.parallel.pipeline, recipe.parallel.context)
        shape, tensors = load_hf_folder(folder)
        engine = native_engine(shape, compiled=asked.compiled)
        engine.load_weights(tensors, version=0)
        yield engine
        return
    with OwnServers(asked, Path("runs") / "servers", lambda line: print(line, flush=True)) as own:
        urls = asked.urls
        if asked.servers:
            urls = run_on_rank_zero(lambda: own.urls(folder, thinking.mode == "isolated"))
        pool = _shared_pool(asked, urls, thinking)
        check_checkpoint(pool, folder)
        yield ServerEngine(pool)


def _shared_pool(asked: Rollout, urls: Sequence[str], thinking: Thinking) -> Pool:
    """This process's pool of the servers, which decode as is wished."""
    settings = PoolSettings(concurrent=asked.max_concurrent_requests, patience_s=asked.patience_s)
    timeouts = Timeouts(answer_s=asked.request_timeout_s)
    pool = met_pool(asked.engine, urls, timeouts, settings, asked.urls_file)
    pool.share(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())
    if thinking.mode not in pool.modes:
        raise UserError(
            f"thinking.mode {thinking.mode}: the servers ({', '.join(pool.abouts)}) are exact in "
            f"{', '.join(sorted(pool.modes))}; start SGLang by serve-rollout --isolated, or set mode replay"
        )
    return pool


def _control(asked: Rollout, url: str) -> Control:
    timeout_s = asked.sync.timeout_s
    if asked.engine == "vllm":
        return VllmControl(url, timeout_s)
    return SglangControl(url, timeout_s, asked.sync.transport)
