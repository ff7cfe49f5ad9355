"""How a command ends: in one line, whoever reports it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from megatron_parallel_r1 import cli
from megatron_parallel_r1.cli import checkpoints
from megatron_parallel_r1.errors import Stopped, UserError
from megatron_parallel_r1.utils.exit import one_line_exit


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], object]:
    """Runs `parallel-r1 verify`, which fails with an error, and returns the exit code."""

    def run(error: BaseException) -> object:
        def command(words: object) -> int:
            raise error

        module = SimpleNamespace(verify_command=command, RESUME="the same command begins again")
        monkeypatch.setattr(checkpoints, "import_module", lambda name: module)
        monkeypatch.setattr("sys.argv", ["parallel-r1", "verify"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "stopped; the same command begins again"),
        (SystemExit(130), 130, "stopped; the same command begins again"),
        (UserError("no such thing"), 2, "error: no such thing"),
        (Stopped("stage rl: stopped"), 85, "stage rl: stopped; the same command continues it"),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/a/model"),
            2,
            "error: /a/model cannot be accessed: Permission denied; "
            "change its permissions or choose another place",
        ),
        (
            OSError(errno.EROFS, os.strerror(errno.EROFS), "/a/model"),
            2,
            "error: /a/model could not be written: Read-only file system; "
            "choose a place that this user can write",
        ),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            2,
            "error: a file could not be written: No space left on device; make room",
        ),
    ],
)
def test_a_command_within_the_command_line_ends_in_one_line(
    verify: Callable[[BaseException], object],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    assert verify(error) == code
    assert capsys.readouterr().err.splitlines() == [line]


def test_what_no_file_refuses_is_no_expected_error() -> None:
    with pytest.raises(PermissionError), one_line_exit():
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))  # as os.kill raises
