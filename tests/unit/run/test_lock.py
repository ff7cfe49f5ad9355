"""A run folder has one user at a time; a lock whose process is gone is taken over, another one never."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.run import lock
from megatron_parallel_r1.run.backends import server_folder
from megatron_parallel_r1.run.folder import open_run_folder
from megatron_parallel_r1.run.lock import (
    LOCK,
    OPENING,
    Holder,
    check_lock,
    is_lock,
    lock_folder,
    opening,
    others_at_work,
    stage_lock,
)
from tests.curriculum.test_run import RECIPE

OTHER = Holder("another-host", pid=1, since=0.0)


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with process.running(seed=1):
        yield


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME"):
        monkeypatch.delenv(name, raising=False)


def held_by(folder: Path, holder: Holder) -> None:
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(holder)))


def test_it_names_this_process_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "out/run"
    with lock_folder(folder):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on .*: wait for it or stop"):
            lock._acquire(folder)
    assert not folder.exists()
    folder.mkdir()
    (folder / "config.yaml").touch()
    with lock_folder(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_dead_process_of_this_machine_holds_nothing(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    held_by(tmp_path, replace(Holder.this_process(), pid=dead.pid))
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_stages_have_locks_of_their_own_which_the_whole_run_takes(tmp_path: Path) -> None:
    first, second = map(stage_lock, ("rl_s1", "rl_s2"))
    with lock_folder(tmp_path, [first]), lock_folder(tmp_path, [second]):
        assert sorted(map(is_lock, tmp_path.iterdir())) == [True, True]
        with (
            pytest.raises(UserError, match="is in use by"),
            lock_folder(tmp_path, [stage_lock("sft"), second]),
        ):
            pass
        assert sorted(file.name for file in tmp_path.iterdir()) == [first, second]
    with lock_folder(tmp_path, [first, second, LOCK]):
        assert len(list(tmp_path.iterdir())) == 3


def test_stages_side_by_side_keep_what_the_other_has_written(tmp_path: Path) -> None:
    """Both begin in a new folder, as stages that start from another run's do."""
    folder, (first, second) = tmp_path / "run", map(stage_lock, ("rl", "rl_again"))
    recipe = read_recipe(RECIPE)
    with opening(folder), lock_folder(folder, [first]):
        assert not others_at_work(folder, [first])
        open_run_folder(recipe, folder, resume=False)
        kept = [folder / "tokenizer", server_folder(folder, ["rl"]), folder / "state.json"]
        for path in kept[:2]:
            path.mkdir(parents=True)
        state = kept[2].read_text()
        with lock_folder(folder, [second]):
            assert others_at_work(folder, [second])
            open_run_folder(recipe, folder, resume=False, beside=True)
            assert all(path.exists() for path in kept) and kept[2].read_text() == state
            for other, fresh in ((read_recipe(RECIPE, ["seed=9"]), False), (recipe, True)):
                with pytest.raises(UserError, match=r"is in use by another stage, (with another|--fresh)"):
                    open_run_folder(other, folder, resume=False, fresh=fresh, beside=True)
    assert not others_at_work(folder, [])
    # The next command starts over, as nothing was trained.
    open_run_folder(recipe, folder, resume=False)
    assert not kept[0].exists() and kept[2].read_text() != state
    places = {server_folder(folder, only) for only in (None, ("rl",), ("rl_again",))}
    assert len(places) == 3


def test_one_command_at_a_time_opens_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / OPENING).write_text(json.dumps(asdict(OTHER)))
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            (tmp_path / OPENING).unlink()

    monkeypatch.setattr(lock.time, "sleep", pause)
    with opening(tmp_path):
        assert len(pauses) == 3 and json.loads((tmp_path / OPENING).read_text())["pid"] == os.getpid()
    assert not tmp_path.exists()
    tmp_path.mkdir()
    (tmp_path / OPENING).write_text(json.dumps(asdict(OTHER)))
    monkeypatch.setattr(lock, "OPENING_S", 0.0)
    with pytest.raises(UserError, match="is in use by process 1 on another-host"), opening(tmp_path):
        pass


def test_a_process_that_was_taken_over_writes_no_more(tmp_path: Path) -> None:
    check_lock(tmp_path)
    with lock_folder(tmp_path):
        check_lock(tmp_path)
        held_by(tmp_path, OTHER)
        with pytest.raises(UserError, match="was taken over by process 1 on another-host"):
            check_lock(tmp_path)


def test_a_number_that_another_process_has_now_holds_nothing(tmp_path: Path) -> None:
    held_by(tmp_path, replace(Holder.this_process(), since=0.0))
    with lock_folder(tmp_path):
        pass


def test_another_machine_is_refused_with_what_to_do(tmp_path: Path) -> None:
    held_by(tmp_path, OTHER)
    with pytest.raises(UserError, match=rf"process 1 on another-host since .* delete {tmp_path / LOCK}"):
        lock._acquire(tmp_path)
    assert (tmp_path / LOCK).is_file()


@pytest.mark.parametrize(("restarts", "taken"), [("0", False), ("1", True)])
def test_a_requeued_job_takes_over_its_own(tmp_path: Path, monkeypatch, restarts: str, taken: bool) -> None:
    held_by(tmp_path, replace(OTHER, slurm_job="7"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    if taken:
        lock._acquire(tmp_path)
    else:
        with pytest.raises(UserError, match="SLURM job 7"):
            lock._acquire(tmp_path)


@pytest.mark.parametrize(
    ("script", "taken"),
    [
        ("echo RUNNING", False),
        ("true", True),
        ("echo Invalid job id specified >&2; exit 1", True),
        ("exit 1", False),
    ],
)
def test_slurm_knows_whether_another_job_is_over(
    tmp_path: Path, monkeypatch, script: str, taken: bool
) -> None:
    tool = tmp_path / "bin/squeue"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    held_by(tmp_path / "run", replace(OTHER, slurm_job="8"))
    if taken:
        lock._acquire(tmp_path / "run")
    else:
        with pytest.raises(UserError, match="SLURM job 8"):
            lock._acquire(tmp_path / "run")


def test_a_job_of_another_cluster_may_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_may_run", lambda job: False)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    held_by(tmp_path, replace(OTHER, slurm_job="8", slurm_cluster="there"))
    with pytest.raises(UserError, match=f"SLURM job 8 since .* delete {tmp_path / LOCK}"):
        lock._acquire(tmp_path)
    held_by(tmp_path, replace(OTHER, slurm_job="8", slurm_cluster="here"))
    lock._acquire(tmp_path)


def test_another_container_of_this_host_counts_like_another_host(tmp_path: Path) -> None:
    dead = replace(Holder.this_process(), since=0.0)  # by its number, which means nothing here
    held_by(tmp_path, replace(dead, pid_namespace="pid:[1]"))
    with pytest.raises(UserError, match=f"if that process is gone, delete {tmp_path / LOCK}"):
        lock._acquire(tmp_path)


def test_a_full_disk_leaves_no_empty_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock.json, "dumps", full)
    with pytest.raises(UserError, match="No space left on device"):
        lock._acquire(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_end_deletes_only_its_own_lock(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        held_by(tmp_path, OTHER)  # somebody deleted the lock, and another command began
    assert json.loads((tmp_path / LOCK).read_text()) == asdict(OTHER)
    (tmp_path / LOCK).unlink()
    with lock_folder(tmp_path):
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).mkdir()  # whatever the file system says at the end


@pytest.mark.parametrize("third", [False, True])
def test_a_lock_that_changes_while_it_is_taken_over(tmp_path: Path, monkeypatch, third: bool) -> None:
    gone = replace(Holder.this_process(), since=0.0)
    fresh, later = replace(OTHER, pid=2), replace(OTHER, pid=3)
    real, reads = lock._read, []

    def read(file: Path) -> Holder | None:
        found = real(file)
        reads.append(file)
        if len(reads) == 1:
            held_by(tmp_path, fresh)
        elif third and file.name != LOCK:
            held_by(tmp_path, later)
        return found

    held_by(tmp_path, gone)
    monkeypatch.setattr(lock, "_read", read)
    with pytest.raises(UserError, match="process 3 on" if third else "process 2 on"):
        lock._acquire(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text()) == asdict(later if third else fresh)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_lock_that_names_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    (tmp_path / LOCK).touch()
    with pytest.raises(UserError, match="names no process; delete it"):
        lock._acquire(tmp_path)
