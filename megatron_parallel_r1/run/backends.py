"""Rollout backends: the native engine in these processes, or servers that follow the trainer's weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.rollout import Rollout
from megatron_parallel_r1.distributed.collectives import (
    all_gather_objects,
    barrier,
    run_on_rank_zero,
    run_on_ranks,
)
from megatron_parallel_r1.distributed.parallel_config import check_native_split
from megatron_parallel_r1.errors import ServersLost, UserError
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.rollout.engine import Engine
from megatron_parallel_r1.rollout.servers.client import Timeouts
from megatron_parallel_r1.rollout.servers.engine import ServerEngine, check_checkpoint, connect_pool
from megatron_parallel_r1.rollout.servers.pool import PoolSettings, ServerPool
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.run.context import RunContext, native_engine
from megatron_parallel_r1.run.own_servers import OwnServers
from megatron_parallel_r1.run.save import save_model
from megatron_parallel_r1.run.transport import usable_sync
from megatron_parallel_r1.sync.control import RowScores, ServerControl, TokenRow
from megatron_parallel_r1.sync.probe import OutputHead
from megatron_parallel_r1.sync.publisher import Publisher, PublishResult
from megatron_parallel_r1.sync.sglang import SglangControl, check_transport
from megatron_parallel_r1.sync.vllm import VllmControl
from megatron_parallel_r1.train.logprob_runner import LogprobRunner, causal_logprobs, probe_texts
from megatron_parallel_r1.utils.rank import is_rank_zero, local_rank, local_world_size, rank


class Backend(Protocol):
    """A rollout engine and its lifecycle."""

    @property
    def engine(self) -> Engine[Any]: ...

    def sleep(self) -> None:
        """Lets the engine release memory until the next weight update."""
        ...

    def metrics(self) -> dict[str, float]:
        """Returns the metrics since the last call; every rank calls it."""
        ...

    def gauges(self) -> dict[str, float]:
        """The state of the servers now; any thread may call it."""
        ...


class NativeBackend:
    """The native engine, inside the training processes."""

    def __init__(self, run: RunContext, tensor_group: dist.ProcessGroup | None) -> None:
        self.engine = native_engine(run.shape, tensor_group, run.recipe.rollout.compiled)

    def sleep(self) -> None:
        return None

    def metrics(self) -> dict[str, float]:
        return {}

    def gauges(self) -> dict[str, float]:
        return {}


class ServerBackend:
    """Rollout servers to which the trainer's weights are published.

    Args:
        own: the servers that the run started; they are not restarted while they sleep.
        published: the weights that the servers have; to publish that version again sends nothing.
    """

    def __init__(
        self,
        pool: ServerPool,
        publisher: Publisher,
        rollout: Rollout,
        own: OwnServers,
        published: PublishResult | None = None,
    ) -> None:
        self.engine = ServerEngine(pool, self._publish)
        self._pool, self._publisher, self._rollout, self._own = pool, publisher, rollout, own
        self._published = published
        # Version of the weights that all servers have, None if they have none of this trainer.
        self._current = published.version if published else None
        self._known = set(pool.infos)
        self._asleep = False

    def sleep(self) -> None:
        if self._rollout.colocated and not self._asleep:
            self._publisher.release()
            self._own.rest()
            self._asleep, self._current = True, None

    def end(self) -> None:
        """Leaves colocated servers asleep."""
        self.sleep()
        self._publisher.end()

    def metrics(self) -> dict[str, float]:
        each = all_gather_objects(self._pool.metrics())
        counts = {name: sum(metrics[name] for metrics in each) for name in each[0]}
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

    def gauges(self) -> dict[str, float]:
        return self._pool.gauges()

    def _publish(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Publishes the model's weights, which the publisher reads itself: `tensors` is not iterated.

        Servers that are awake and have them already get nothing: an evaluation may come before the rollout.
        """
        if self._asleep:
            self._own.wake(self._rollout.patience_s)
        # The run's own servers are known from the start.
        urls = self._known if self._rollout.servers else set(self._pool.infos)
        for url in self._known - urls:
            self._publisher.remove(url)
        for url in urls - self._known:
            self._publisher.add(_control(self._rollout, url))
            self._current = None
        self._known = urls
        if self._published is None or self._current != version:
            self._published = self._publisher.publish(version)
        self._current, self._asleep = version, False
        self._pool.set_version(version, self._published.up_to_date)


def server_folder(run: Path, only: Collection[str] | None) -> Path:
    """Where a command keeps what its own servers need; commands for other stages may run beside it.

    Args:
        only: the stages that it trains; None: all.
    """
    return run / "servers" if only is None else run / "servers" / "-".join(sorted(only))


class Backends:
    """Opens the backend of a recipe, and owns the servers that the run starts itself.

    Args:
        folder: for the model that these start from, and for their logs.
    """

    def __init__(self, run: RunContext, folder: Path) -> None:
        self._run, self._folder = run, folder
        report = partial(print, flush=True)
        self._own = OwnServers(run.recipe.rollout, folder, report, local_world_size())
        # Version of the weights with which colocated servers went to sleep.
        self._slept: int | None = None

    def __enter__(self) -> Backends:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._own.end()

    @contextmanager
    def open(
        self,
        model: Model,
        thinking: Thinking,
        version: int,
        tensor_group: dist.ProcessGroup | None = None,
    ) -> Iterator[Backend]:
        """Opens a backend, which the model's weights must be loaded into.

        Args:
            version: of these weights when they are loaded first; sleeping servers take them here.
            tensor_group: another group of the tensor-parallel ranks, for an engine in a second thread.

        Raises:
            UserError: no server responds, none decodes in `thinking.mode`, or one cannot receive weights.
        """
        rollout = self._run.recipe.rollout
        if rollout.engine == "native":
            yield NativeBackend(self._run, tensor_group)
            return
        pool: ServerPool | None = None
        if rollout.servers:
            urls, beside = self._start_servers(model, thinking)
        else:
            pool = _shared_pool(rollout, rollout.urls, thinking)
            urls, beside = tuple(pool.infos), ()
            for url, info in pool.infos.items():
                check_transport(url, info.copies, info.nodes, rollout.sync.transport)
        # Where NCCL's versions differ it is not the recipe's; `check_engine` has warned of that.
        sync, _ = run_on_rank_zero(lambda: usable_sync(rollout, pool.infos if pool else {}))
        rollout = rollout.replace(sync=sync)
        each = rollout.colocated and sync.transport == "tensor"
        controls = [_control(rollout, url) for url in (beside if each else urls)]
        probe, scorer = probe_texts(self._run.shape.vocab), _TrainerLogprobs(model, self._run)
        asleep = self._slept is not None
        publisher = Publisher(controls, model, rollout.sync, probe, scorer, rollout.colocated, asleep)
        published: PublishResult | None = None
        try:
            if self._slept is not None:
                self._own.wake(rollout.patience_s)
                # Two publications in a row have different versions.
                published = publisher.publish(self._slept + 1 if version == self._slept else version)
            pool = pool or _shared_pool(rollout, urls, thinking)
            backend = ServerBackend(pool, publisher, rollout, self._own, published)
            yield backend
        except BaseException as error:
            # Other ranks may be gone: avoid collectives.
            for control in controls:
                control.close()
            if rollout.colocated:
                # Their memory, for the checkpoint of the last finished step.
                self._own.end()
                if isinstance(error, UserError) and error.on_all_ranks:
                    barrier()
            if isinstance(error, ServersLost):
                error.own = bool(rollout.servers)
            raise
        backend.end()
        self._slept = backend.engine.version if rollout.colocated else None

    @contextmanager
    def engine_with(self, model: Model, thinking: Thinking, version: int) -> Iterator[Engine[Any]]:
        """Opens a backend whose engine holds the model's weights; raises as `open`."""
        with self.open(model, thinking, version) as backend:
            backend.engine.load_weights(hf_tensors(model), version)
            yield backend.engine

    def _start_servers(self, model: Model, thinking: Thinking) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Starts servers with the current weights; returns the URLs of all, and of those beside this rank."""
        folder = self._folder / "model"
        if not folder.is_dir():
            save_model(self._run, model, folder)
        recipe = self._run.recipe
        # The servers outlive this stage.
        modes = {thinking.mode, *(recipe.thinking_of(stage).mode for stage in recipe.stages)}
        starts = local_rank() == 0 if recipe.rollout.colocated else is_rank_zero()

        def start() -> tuple[int, tuple[str, ...]]:
            return rank(), self._own.urls(folder, "isolated" in modes)

        started = run_on_ranks(start if starts else None)
        first, here = next(node for node in reversed(started) if node[0] <= rank())
        # Server i has the GPUs from i x tensor on, and is beside the rank that has the first of them.
        places = [index * recipe.rollout.tensor % local_world_size() for index in range(len(here))]
        beside = tuple(url for url, place in zip(here, places, strict=True) if place == rank() - first)
        return tuple(url for _rank, some in started for url in some), beside


class _TrainerLogprobs:
    """Computes the trainer's log-probs of probe rows."""

    def __init__(self, model: Model, run: RunContext) -> None:
        self._model, self._capacity = model, run.recipe.max_tokens_per_micro_batch

    def __call__(self, rows: Sequence[TokenRow], head: OutputHead | None) -> Sequence[RowScores]:
        runner = LogprobRunner(self._model, head_VE=head.rows_VE if head else None)
        return causal_logprobs(runner, rows, self._capacity)


@contextmanager
def engine_of_checkpoint(recipe: Recipe, folder: Path, thinking: Thinking) -> Iterator[Engine[Any]]:
    """Opens the recipe's engine with the weights of a folder; servers that already run must hold them.

    Raises:
        UserError: the folder is not a checkpoint, or the engine cannot decode in `thinking.mode`.
    """
    rollout = recipe.rollout
    if rollout.engine == "native":
        check_native_split(recipe.parallel.pipeline, recipe.parallel.context)
        shape, tensors = load_hf_folder(folder)
        engine = native_engine(shape, compiled=rollout.compiled)
        engine.load_weights(tensors, version=0)
        yield engine
        return
    # No rank holds a model here.
    with OwnServers(rollout, Path("runs") / "servers", partial(print, flush=True), ranks=0) as own:
        urls = rollout.urls
        if rollout.servers:
            urls = run_on_rank_zero(lambda: own.urls(folder, thinking.mode == "isolated"))
        pool = _shared_pool(rollout, urls, thinking)
        check_checkpoint(pool, folder)
        yield ServerEngine(pool)


def _shared_pool(rollout: Rollout, urls: Sequence[str], thinking: Thinking) -> ServerPool:
    """Connects this rank to the servers and checks that they decode in `thinking.mode`."""
    settings = PoolSettings(concurrent=rollout.max_concurrent_requests, patience_s=rollout.patience_s)
    timeouts = Timeouts(answer_s=rollout.request_timeout_s)
    share = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    key, router = rollout.api_key, rollout.router
    pool = connect_pool(rollout.engine, urls, timeouts, settings, rollout.urls_file, share, key, router)
    if thinking.mode not in pool.modes:
        raise UserError(
            f"thinking.mode {thinking.mode}: the servers ({', '.join(pool.infos)}) are exact in "
            f"{', '.join(sorted(pool.modes))}; start SGLang by serve-rollout --isolated, or set mode replay"
        )
    return pool


def _control(rollout: Rollout, url: str) -> ServerControl:
    timeout_s = rollout.sync.timeout_s
    if rollout.engine == "vllm":
        return VllmControl(url, timeout_s, rollout.api_key)
    return SglangControl(url, timeout_s, rollout.sync.transport, rollout.api_key)
