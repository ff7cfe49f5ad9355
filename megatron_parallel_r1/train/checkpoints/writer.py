"""One checkpoint on its way to the disk, while training goes on."""

from __future__ import annotations

import errno
import queue
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_parallel_r1.checkpoint_formats.safetensors_file import save_tensors
from megatron_parallel_r1.distributed.collectives import all_gather_objects, gather_objects, run_on_rank_zero
from megatron_parallel_r1.train.checkpoints.fp8_state import FILE as EXTRA
from megatron_parallel_r1.train.checkpoints.manifest import Manifest, Stamp, stamp, write_manifest
from megatron_parallel_r1.utils.files import fsync_path


class WriteFailed(Exception):
    """A checkpoint could not be written; the message says which process met what."""


class Writing:
    """A copy of the training state, taken at once, that a thread writes into a folder.

    The thread calls Megatron's write function. Megatron itself calls it in a forked process, which would
    outlive a run that is killed, and find its folder gone when the run is back; and a fork of a process with
    threads may hang. Writing and hashing leave the interpreter free for the training.

    Args:
        folder: exists, is empty, and is seen by all processes.
        parts: of this process; they may change as soon as this returns.
        extra: extra states of this process's layers, copies.
        about: the manifest but for its files.

    All processes make one at the same time.
    """

    def __init__(
        self, folder: Path, parts: list[ShardedTensor], extra: dict[str, torch.Tensor], about: Manifest
    ) -> None:
        self._folder, self._extra, self._about = folder, extra, about
        copies = [
            replace(part, data=part.data.to("cpu", copy=True))
            for part in parts
            if is_main_replica(part.replica_id)
        ]
        # Megatron's queue lives in a server process, for writers in other processes.
        filesystem_async._results_queue = queue.Queue()
        self._plan = _Plan("torch_dist", 1, thread_count=1)
        self._plan.async_save({str(number): copy for number, copy in enumerate(copies)}, str(folder))
        self._stamps: dict[str, Stamp] = {}
        self._results: list[Any] = []
        self._error: str | None = None
        # No daemon: a process that ends in between waits for it, where torch would abort under its feet.
        self._thread = threading.Thread(target=self._write, name=f"write {folder.name}")
        self._thread.start()

    @property
    def is_written(self) -> bool:
        """Whether this process's files are on the disk, or cannot be."""
        return not self._thread.is_alive()

    def complete(self) -> None:
        """Waits for the files of all processes and writes the manifest; all processes call it together.

        Raises:
            WriteFailed: on all processes, if one could not write.
        """
        self._thread.join()
        errors = [
            f"{error} (process {rank})" for rank, error in enumerate(all_gather_objects(self._error)) if error
        ]
        if errors:
            raise WriteFailed(errors[0])
        told = gather_objects((self._stamps, self._results, self._extra))
        run_on_rank_zero(lambda: self._finish(told))

    def _write(self) -> None:
        writer = self._plan.writer
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []
        try:
            for number, bucket in enumerate(writer.write_buckets):
                results: queue.Queue[Any] = queue.Queue()
                pending: queue.Queue[int] = queue.Queue()
                pending.put(number)
                writer.write_preloaded_data(transforms, number, bucket, results, pending, use_fsync=True)
                _, outcome = results.get_nowait()
                if isinstance(outcome, Exception):
                    raise outcome
                self._results += outcome
                # Megatron's fsync comes before the last bytes have left the stream's buffer; this one after.
                fsync_path(Path(bucket[0]))
                self._stamps[bucket[1]] = stamp(Path(bucket[0]))
        except Exception as error:
            self._error = _reason(error)
        finally:
            writer.write_buckets = []

    def _finish(self, told: list[tuple[dict[str, Stamp], list[Any], dict[str, torch.Tensor]]]) -> None:
        """What the first process adds: where each tensor is, the extra states, and the manifest."""
        stamps = {name: stamp for some, _, _ in told for name, stamp in some.items()}
        try:
            self._plan.writer.finish(self._plan.metadata, [results for _, results, _ in told])
            if extra := {name: state for _, _, some in told for name, state in some.items()}:
                save_tensors(extra, self._folder / EXTRA)
            torch.save({"optimizer_steps": self._about.optimizer_steps}, self._folder / COMMON_STATE_FNAME)
            save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))
            for file in [file for file in self._folder.iterdir() if file.name not in stamps]:
                fsync_path(file)
                stamps[file.name] = stamp(file)
            write_manifest(self._folder, replace(self._about, files=stamps))
        except Exception as error:
            raise WriteFailed(f"{_reason(error)} (process 0)") from None


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's strategy, of which only the plan is wanted: who writes what into which file.

    Attributes:
        writer: with this process's buckets, one a file.
        metadata: of the whole checkpoint; on the first process.
    """

    writer: filesystem_async.FileSystemWriterAsync
    metadata: Any

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


def _reason(error: BaseException) -> str:
    """An error in a line; torch wraps that of the operating system in one of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return "the disk is full" if cause.errno == errno.ENOSPC else cause.strerror
        cause = cause.__cause__ or cause.__context__
    return " ".join(f"{type(error).__name__}: {error}".split())
