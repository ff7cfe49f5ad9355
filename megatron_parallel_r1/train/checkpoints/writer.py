"""Writes a checkpoint in the background while training continues."""

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
from megatron_parallel_r1.train.checkpoints.manifest import Manifest, write_manifest
from megatron_parallel_r1.train.checkpoints.sharded import EXTRA as EXTRA
from megatron_parallel_r1.utils.files import FileDigest, file_digest, fsync_path


class WriteFailed(Exception):
    """A checkpoint could not be written; the message names the error and the rank."""


class CheckpointWriter:
    """Copies the training state at once and writes it to a folder in a thread.

    The thread calls Megatron's write function. Megatron itself calls it in a forked process, which would
    outlive a killed run and find its folder gone when the run is back; and forking a process with threads may
    hang. Writing and hashing release the GIL.

    All ranks construct it at the same time.

    Args:
        folder: an existing, empty folder that all ranks see.
        parts: parts of this rank; they may change as soon as this returns.
        extra: copies of the extra states of this rank's layers.
        about: the manifest without its files.
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
        # Replaces Megatron's queue, which lives in a server process for writers in other processes.
        filesystem_async._results_queue = queue.Queue()
        self._plan = _Plan("torch_dist", 1, thread_count=1)
        self._plan.async_save({str(number): copy for number, copy in enumerate(copies)}, str(folder))
        self._digests: dict[str, FileDigest] = {}
        self._results: list[Any] = []
        self._error: str | None = None
        # No daemon: an exiting process waits for it, where torch would otherwise abort the process.
        self._thread = threading.Thread(target=self._write, name=f"write {folder.name}")
        self._thread.start()

    @property
    def is_written(self) -> bool:
        """Whether this rank's files are on disk, or have failed."""
        return not self._thread.is_alive()

    def complete(self) -> None:
        """Waits for the files of all ranks and writes the manifest; all ranks call it together.

        Raises:
            WriteFailed: on all ranks, if a rank could not write.
        """
        self._thread.join()
        errors = [
            f"{error} (process {rank})" for rank, error in enumerate(all_gather_objects(self._error)) if error
        ]
        if errors:
            raise WriteFailed(errors[0])
        ranks = gather_objects((self._digests, self._results, self._extra))
        run_on_rank_zero(lambda: self._finish(ranks))

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
                # Megatron's fsync comes before the last bytes have left the stream's buffer, this one after.
                fsync_path(Path(bucket[0]))
                self._digests[bucket[1]] = file_digest(Path(bucket[0]))
        except Exception as error:
            self._error = _reason(error)
        finally:
            writer.write_buckets = []

    def _finish(self, ranks: list[tuple[dict[str, FileDigest], list[Any], dict[str, torch.Tensor]]]) -> None:
        """Adds rank zero's files: the index of tensors, the extra states, and the manifest."""
        digests = {name: digest for some, _, _ in ranks for name, digest in some.items()}
        try:
            self._plan.writer.finish(self._plan.metadata, [results for _, results, _ in ranks])
            if extra := {name: state for _, _, some in ranks for name, state in some.items()}:
                save_tensors(extra, self._folder / EXTRA)
            torch.save({"optimizer_steps": self._about.optimizer_steps}, self._folder / COMMON_STATE_FNAME)
            save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))
            for file in [file for file in self._folder.iterdir() if file.name not in digests]:
                fsync_path(file)
                digests[file.name] = file_digest(file)
            write_manifest(self._folder, replace(self._about, files=digests))
        except Exception as error:
            raise WriteFailed(f"{_reason(error)} (process 0)") from None


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's save strategy, used for its plan alone: which rank writes what into which file.

    Attributes:
        writer: holds this rank's buckets, one per file.
        metadata: of the whole checkpoint; on rank zero.
    """

    writer: filesystem_async.FileSystemWriterAsync
    metadata: Any

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


def _reason(error: BaseException) -> str:
    """Describes an error in one line; torch wraps operating system errors in its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return "the disk is full" if cause.errno == errno.ENOSPC else cause.strerror
        cause = cause.__cause__ or cause.__context__
    return " ".join(f"{type(error).__name__}: {error}".split())
