"""A killed conversion leaves nothing that looks complete, and the same command goes on with it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_parallel_r1.checkpoint_formats.torch_dist import find_checkpoint
from megatron_parallel_r1.conversion import to_megatron
from megatron_parallel_r1.conversion.shard_plan import Target
from megatron_parallel_r1.conversion.to_hf import megatron_to_hf
from megatron_parallel_r1.conversion.to_megatron import hf_to_megatron
from megatron_parallel_r1.conversion.work_folder import AT_ONCE, SUMS, WorkFolder
from megatron_parallel_r1.errors import UserError
from tests.unit.conversion.folders import assert_equal, tensors_of, write_hf

HERE = Target(2, 2)


class Killed(BaseException):
    pass


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killer(after: int):
    """An `advance` that ends the conversion after so many calls."""
    calls = iter(range(after))

    def advance(count: int) -> None:
        if next(calls, None) is None:
            raise Killed

    return advance


@pytest.fixture
def hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_hf(tmp_path / "hf", "qwen3")
    monkeypatch.setattr(to_megatron, "FILE_BYTES", 40_000)  # several files a rank
    return tmp_path / "hf"


@pytest.mark.parametrize("after", [0, 1, 17, 40])
def test_it_goes_on_and_ends_as_if_never_killed(after: int, hf: Path, tmp_path: Path) -> None:
    hf_to_megatron(hf, tmp_path / "whole", HERE)
    with pytest.raises(Killed):
        hf_to_megatron(hf, tmp_path / "out", HERE, advance=killer(after))
    work = tmp_path / ".out.converting"
    assert not (tmp_path / "out").exists() and find_checkpoint(work) is None
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("*.distcp")}
    written: list[int] = []
    hf_to_megatron(hf, tmp_path / "out", HERE, advance=written.append)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and not work.exists()
    untouched = {path.name: stamp for path, stamp in kept.items()}
    same = [
        path
        for path in (tmp_path / "out").rglob("*.distcp")
        if untouched.get(path.name) == path.stat().st_mtime_ns
    ]
    # All but those that were being written.
    assert max(0, len(kept) - AT_ONCE) <= len(same) < max(1, len(kept))


def test_it_goes_on_inside_its_own_source(hf: Path) -> None:
    with pytest.raises(Killed):
        hf_to_megatron(hf, hf / "megatron", HERE, advance=killer(17))
    kept = {path.name: path.stat().st_mtime_ns for path in (hf / ".megatron.converting").rglob("*.distcp")}
    hf_to_megatron(hf, hf / "megatron", HERE)
    stamps = {path.name: path.stat().st_mtime_ns for path in (hf / "megatron").rglob("*.distcp")}
    same = [name for name, stamp in kept.items() if stamps[name] == stamp]
    assert len(same) >= len(kept) - AT_ONCE > 0


SELF_KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_parallel_r1.conversion import to_megatron
from megatron_parallel_r1.conversion.shard_plan import Target
to_megatron.FILE_BYTES = 40_000
calls = iter(range(17))
def advance(count):
    if next(calls, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
to_megatron.hf_to_megatron(*map(Path, sys.argv[1:]), Target(2, 2), advance=advance)
"""


def test_it_goes_on_after_sigkill(hf: Path, tmp_path: Path) -> None:
    """Which runs no handler and closes no file, unlike the exceptions of the other tests."""
    hf_to_megatron(hf, tmp_path / "whole", HERE)
    command = [sys.executable, "-c", SELF_KILLED, str(hf), str(tmp_path / "out")]
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    work = tmp_path / ".out.converting"
    assert not (tmp_path / "out").exists() and find_checkpoint(work) is None
    assert len(list(work.rglob("*.distcp"))) > 1
    hf_to_megatron(hf, tmp_path / "out", HERE)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and not work.exists()


def test_and_so_does_the_way_back(hf: Path, tmp_path: Path) -> None:
    hf_to_megatron(hf, tmp_path / "megatron", HERE)
    with pytest.raises(Killed):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", shard_bytes=100_000, advance=killer(25))
    assert not (tmp_path / "back").exists()
    assert len(list((tmp_path / ".back.converting").glob("*.safetensors"))) >= 2
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", shard_bytes=100_000)
    assert_equal(tensors_of(hf), tensors_of(tmp_path / "back"))


def test_what_was_begun_of_another_source_is_thrown_away(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        hf_to_megatron(hf, tmp_path / "out", HERE, advance=killer(30))
    write_hf(hf, "qwen3", seed=1)
    hf_to_megatron(hf, tmp_path / "out", HERE)
    megatron_to_hf(tmp_path / "out", tmp_path / "back")
    assert_equal(tensors_of(hf), tensors_of(tmp_path / "back"))


def test_a_journal_cut_in_a_line_is_read_up_to_there(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        hf_to_megatron(hf, tmp_path / "out", HERE, advance=killer(30))
    journal = tmp_path / ".out.converting" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])
    hf_to_megatron(hf, tmp_path / "out", HERE)
    megatron_to_hf(tmp_path / "out", tmp_path / "back")
    assert_equal(tensors_of(hf), tensors_of(tmp_path / "back"))


def test_what_is_there_is_left_alone_unless_told(hf: Path, tmp_path: Path) -> None:
    hf_to_megatron(hf, tmp_path / "out", Target())
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="out exists; choose another folder"):
        hf_to_megatron(hf, tmp_path / "out", HERE)
    with pytest.raises(Killed):
        hf_to_megatron(hf, tmp_path / "out", HERE, replace=True, advance=killer(5))
    assert contents(tmp_path / "out") == before
    hf_to_megatron(hf, tmp_path / "out", HERE, replace=True)
    assert contents(tmp_path / "out") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_two_cannot_write_one_folder(tmp_path: Path) -> None:
    with (
        WorkFolder(tmp_path / "out", {}),
        pytest.raises(UserError, match="is being written by another process"),
    ):
        WorkFolder(tmp_path / "out", {})


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    def fail(sink: object) -> None:
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(UserError, match="could not be written: No space left on device"),
        WorkFolder(tmp_path / "out", {}) as work,
    ):
        work.file("a", lambda sink: sink.write(b"x"))
        work.file("b", fail)
    assert not (tmp_path / "out").exists()
    with WorkFolder(tmp_path / "out", {}) as work:
        assert work.resumed == 1
        work.file("b", lambda sink: sink.write(b"y"))
        work.complete()
    assert contents(tmp_path / "out").keys() == {"a", "b", SUMS}


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_disk_that_fills_up_is_one_line(way: str, hf: Path, tmp_path: Path) -> None:
    """Under torch.save, too, which has an error of its own for whatever its file raises."""
    hf_to_megatron(hf, tmp_path / "megatron", HERE)

    def convert() -> None:
        if way == "there":
            hf_to_megatron(hf, tmp_path / "out", HERE)
        else:
            megatron_to_hf(tmp_path / "megatron", tmp_path / "out")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, hard))
    try:
        with pytest.raises(UserError, match="out could not be written: File too large; fix that"):
            convert()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    convert()
    assert (tmp_path / "out").is_dir()


def test_a_journal_that_cannot_be_written_stops_all_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"file {number}" for number in range(12)]

    def write_all() -> None:
        with WorkFolder(tmp_path / "out", {}) as work:
            work.files([(name, lambda sink: sink.write(b"x")) for name in names])
            work.complete()

    real, calls = os.fsync, iter(range(100))

    def full(descriptor: int) -> None:
        if next(calls) >= 8:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for _ in range(2):  # The second finds no room for its journal, and leaves the first one's.
            with pytest.raises(UserError, match="out could not be written: No space left"):
                write_all()
    assert len(list((tmp_path / ".out.converting").glob("file *"))) < len(names)
    with WorkFolder(tmp_path / "out", {}) as work:
        assert work.resumed >= 2
    write_all()
    assert contents(tmp_path / "out").keys() == {*names, SUMS}
