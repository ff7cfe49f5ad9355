"""Engines by name, each opened for one checkpoint.

A new engine is a context manager that yields an `OpenedEngine`, and a line in `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.api_key import read_key
from megatron_parallel_r1.utils.rank import world_size

if TYPE_CHECKING:
    from megatron_parallel_r1.rollout.engine import Engine

# Longest time until a server responds, in seconds.
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Which checkpoint to open, and how.

    Attributes:
        folder: of the checkpoint, in Hugging Face form.
        seed: of this process's random number generators.
        tensor: processes that share one copy of the model (native).
        servers: base addresses (server engines).
        key_variable, key_file: where their API key is.
    """

    folder: Path
    seed: int = 0
    tensor: int = 1
    servers: tuple[str, ...] = ()
    key_variable: str | None = None
    key_file: Path | None = None


@dataclass(frozen=True, slots=True)
class OpenedEngine:
    """An engine with the checkpoint's weights, and this process's share of the work.

    Attributes:
        copy, copies: index of this process's copy of the model, and number of copies.
        is_replica_leader: whether this process writes the records of its copy.
    """

    engine: Engine[Any]
    copy: int = 0
    copies: int = 1
    is_replica_leader: bool = True


EngineOpener = Callable[[EngineSpec], AbstractContextManager[OpenedEngine]]


def engine_opener(name: str) -> EngineOpener:
    """Returns the function that opens an engine.

    Raises:
        UserError: no engine has that name.
    """
    if name not in ENGINES:
        raise UserError(f"engine {name!r}: not built in, use one of {', '.join(ENGINES)}")
    return ENGINES[name]


@contextmanager
def _native(spec: EngineSpec) -> Iterator[OpenedEngine]:
    """Decodes in this process, or in all processes of a launch, which exit together."""
    from megatron.core import parallel_state

    from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
    from megatron_parallel_r1.distributed import process
    from megatron_parallel_r1.distributed.collectives import barrier, is_replica_leader
    from megatron_parallel_r1.distributed.parallel_config import ParallelConfig, check_parallel
    from megatron_parallel_r1.run.context import native_engine

    if spec.servers:
        raise UserError("engine native: decodes in this process and takes no --server; remove it")
    shape, tensors = load_hf_folder(spec.folder)
    try:
        parallel = ParallelConfig(tensor=spec.tensor)
    except ValueError as error:
        raise UserError(f"--tensor: {error}") from None
    check_parallel(shape, parallel, world_size())
    with process.running(spec.seed, parallel):
        engine = native_engine(shape)
        engine.load_weights(tensors, version=0)
        yield OpenedEngine(
            engine,
            copy=parallel_state.get_data_parallel_rank(),
            copies=parallel_state.get_data_parallel_world_size(),
            is_replica_leader=is_replica_leader(),
        )
        barrier()


@contextmanager
def _served(engine: str, spec: EngineSpec) -> Iterator[OpenedEngine]:
    """Decodes on rollout servers of the checkpoint; the router balances the load."""
    from megatron_parallel_r1.rollout.servers.client import Timeouts
    from megatron_parallel_r1.rollout.servers.engine import ServerEngine, check_checkpoint, connect_pool
    from megatron_parallel_r1.rollout.servers.pool import PoolSettings

    if not spec.servers:
        raise UserError(
            f"engine {engine}: give --server URL of each, as `parallel-r1 serve-rollout --engine {engine} "
            f"--checkpoint {spec.folder}` prints them"
        )
    if world_size() > 1:
        raise UserError(f"engine {engine}: one process uses all servers; start it without torchrun")
    key = read_key(spec.key_variable, spec.key_file)
    pool = connect_pool(engine, spec.servers, Timeouts(), PoolSettings(patience_s=PATIENCE_S), key=key)
    check_checkpoint(pool, spec.folder)
    yield OpenedEngine(ServerEngine(pool))


ENGINES: Mapping[str, EngineOpener] = MappingProxyType(
    {"native": _native, "sglang": partial(_served, "sglang"), "vllm": partial(_served, "vllm")}
)
