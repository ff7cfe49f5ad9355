"""The locks of a run folder: one command at a time, also among machines that share a file system.

`run.lock` names the process that uses the whole run, `run.lock.STAGE` the one that trains a stage: stages of
one run may be trained side by side. A command for the whole run takes all. A lock is created exclusively, on
NFS and Lustre too, and deleted at the end. A killed process leaves it; the next command takes it over where
it can tell that the process is gone: on the same machine, in a requeued SLURM job, or if SLURM no longer runs
the job.

Commands for stages share the run's other files. One at a time opens the folder (`opening`), so that a command
sees the locks of those alone that have opened it.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from megatron_parallel_r1.distributed.collectives import run_on_rank_zero
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.rank import is_rank_zero

LOCK = "run.lock"
OPENING = f"{LOCK}.opening"
OPENING_S = 300.0
# Clocks that were set meanwhile make a process look younger or older.
CLOCK_TOLERANCE_S = 60.0
SQUEUE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that uses a run folder.

    Attributes:
        since: when it locked the folder, in seconds since 1970.
        slurm_job: its SLURM job, "" without one.
        restarts: how often SLURM requeued that job before.
        slurm_cluster: the job's cluster.
        pid_namespace: where `pid` is a number of; a container can share a host's name. "" on other systems.
    """

    host: str
    pid: int
    since: float
    slurm_job: str = ""
    restarts: int = 0
    slurm_cluster: str = ""
    pid_namespace: str = ""

    @classmethod
    def this_process(cls) -> Holder:
        job, restarts, cluster = (
            os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "RESTART_COUNT", "CLUSTER_NAME")
        )
        namespace = ""
        with suppress(OSError):  # no Linux
            namespace = os.readlink("/proc/self/ns/pid")
        return cls(
            socket.gethostname(), os.getpid(), time.time(), job, int(restarts or 0), cluster, namespace
        )

    def is_visible_to(self, now: Holder) -> bool:
        """Returns whether process `now` can look up this one by its number."""
        return (self.host, self.pid_namespace) == (now.host, now.pid_namespace)

    def is_gone(self, now: Holder) -> bool:
        """Returns whether process `now` can tell that this one has ended."""
        if self.is_visible_to(now):
            try:
                process = psutil.Process(self.pid)
                is_younger = process.create_time() > self.since + CLOCK_TOLERANCE_S
                return is_younger or process.status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return True
        if not self.slurm_job or self.slurm_cluster != now.slurm_cluster:
            return False
        if self.slurm_job == now.slurm_job:
            return self.restarts < now.restarts
        return not _may_run(self.slurm_job)

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        job = f", SLURM job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}{job} since {since}"


def stage_lock(stage: str) -> str:
    """The name of a stage's lock."""
    return f"{LOCK}.{stage}"


@contextmanager
def lock_folder(folder: Path, names: Sequence[str] = (LOCK,)) -> Iterator[None]:
    """Takes locks of a run folder, which is created if need be, for the block. A collective over all ranks.

    Args:
        names: of the locks.

    Raises:
        UserError: another process has one of them, or the folder cannot be written; on every rank.
    """
    held: dict[str, Holder] = {}

    def acquire() -> None:
        for name in names:
            held[name] = _acquire(folder, name)

    try:
        run_on_rank_zero(acquire)
        yield
    finally:
        for name, own in held.items():
            _release(folder, name, own)


def _release(folder: Path, name: str, own: Holder) -> None:
    """Deletes a lock, and the folder if nothing else is in it."""
    if not is_rank_zero():
        return
    with suppress(OSError, UserError):
        if _read(folder / name) == own:  # nobody deleted it, as a refusal advises
            (folder / name).unlink()
    with suppress(OSError):  # nothing was written
        folder.rmdir()


@contextmanager
def opening(folder: Path) -> Iterator[None]:
    """Keeps other commands from opening a run folder, for the block; waits for one that does.

    Raises:
        UserError: another one does for longer than OPENING_S.
    """
    end = time.monotonic() + OPENING_S

    def acquire() -> Holder:
        while True:
            try:
                return _acquire(folder, OPENING)
            except UserError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.2)

    held = run_on_rank_zero(acquire)
    try:
        yield
    finally:
        _release(folder, OPENING, held)


def others_at_work(folder: Path, own: Collection[str]) -> bool:
    """Whether other commands use a run folder now.

    Args:
        own: names of this command's locks.
    """
    now = Holder.this_process()
    others = [file for file in folder.glob(f"{LOCK}*") if file.name not in (*own, OPENING)]
    return any(found is not None and not found.is_gone(now) for found in map(_read, others))


def check_lock(folder: Path, name: str = LOCK) -> None:
    """Checks, before this process writes to a folder that it has locked, that nobody has taken it over.

    SLURM requeues the job of a node that hangs; when the node goes on, so do its processes for a while.
    These end at once, with exit code 0: with any other, srun would end the new attempt's step, whose id is
    the same.

    Raises:
        UserError: another job, or another process of this machine, has the folder now.
    """
    found, own = _read(folder / name), Holder.this_process()
    if found is None or replace(found, since=0.0) == replace(own, since=0.0):
        return
    message = f"{folder} was taken over by {found} while this process or its node hung"
    if own.slurm_job and found.slurm_job == own.slurm_job:
        print(message, file=sys.stderr, flush=True)
        os._exit(0)
    raise UserError(message)


def is_lock(file: Path) -> bool:
    """Returns whether a file is the lock of its folder, or one that a command was taking over."""
    return file.name == LOCK or file.name.startswith((f"{LOCK}.", f".{LOCK}."))


def _acquire(folder: Path, name: str = LOCK) -> Holder:
    file, own = folder / name, Holder.this_process()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                _take_over(file, own)
                continue
            try:
                with open(descriptor, "w") as lock:
                    lock.write(json.dumps(asdict(own)) + "\n")
            except BaseException:
                file.unlink()
                raise
            return own
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; choose another out") from None


def _take_over(file: Path, own: Holder) -> None:
    """Removes the lock of a process that is gone.

    Raises:
        UserError: it may still run.
    """
    found = _read(file)
    if found is None:
        return
    if not found.is_gone(own):
        advice = "wait for it or stop it, or choose another name"
        if not found.is_visible_to(own):
            advice += f"; if that process is gone, delete {file}"
        raise UserError(f"{file.parent} is in use by {found}: {advice}")
    # Another command may have taken it over since it was read.
    aside = file.with_name(f".{LOCK}.{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):
        file.rename(aside)
        if _read(aside) != found:
            with suppress(FileExistsError):  # a third command's
                os.link(aside, file)
        aside.unlink()


def _read(file: Path) -> Holder | None:
    """The holder that a lock names; None if there is no lock any more."""
    for pause_s in (0.1, 1.0, 0.0):  # it is empty for a moment
        try:
            return Holder(**json.loads(file.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            time.sleep(pause_s)
    raise UserError(f"{file} names no process; delete it if no command uses {file.parent}")


def _may_run(job: str) -> bool:
    """Returns whether SLURM may still run a job; True also where it cannot be asked."""
    try:
        answer = subprocess.run(
            ("squeue", "--noheader", "--jobs", job, "--format", "%T"),
            capture_output=True,
            text=True,
            timeout=SQUEUE_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return True
    is_unknown = "Invalid job id" in answer.stderr
    return bool(answer.stdout.strip()) or (answer.returncode != 0 and not is_unknown)
