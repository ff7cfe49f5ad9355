"""Hostile answers, and what is left of the processes.

Not covered: a machine so loaded that an ordinary pair takes longer than the limit.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_parallel_r1.rewards import verifier_worker
from megatron_parallel_r1.rewards.fast_equality import Verdict
from megatron_parallel_r1.rewards.verification import extract_answer
from megatron_parallel_r1.rewards.verifier import Verifier

ROOT = Path(__file__).resolve().parents[3]
TOWER = "9^{9^{9^9}}"


def gone(pid: int) -> bool:
    """No such process, or only its exit status left for a parent to read."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


@pytest.fixture(scope="module")
def three() -> Iterator[Verifier]:
    """With training's own limit, and a process for each pair of a hostile answer."""
    with Verifier(workers=3) as verifier:
        yield verifier


@pytest.mark.parametrize(
    "answer",
    [
        "{" * 10**6,
        "{" * 10**6 + "}" * 10**6,
        "9" * 10**5,
        "\\frac{" * 10**5,
        "\ud800",
        "4\x002",
        "\x00",
        "\\",
        "}{",
        "^" * 900,
        "__import__('os').system('exit 1')",
        "lambda: 42",
        "\\input{/etc/passwd}",
        "\\begin{pmatrix}",
        "1/0",
        "9" * 350,
        "9" * 900,
        "🙂",
        "\n",
        "",
        "(" * 10**6,
        "\\frac{1}{" * 10**6 + "2" + "}" * 10**6,
        "\\sqrt{" * 150 + "2" + "}" * 150,
        "(" * 100 + "7" + ")" * 100,
        "-" * 900,
        "2^" * 450,
        "9" * 300 + "." + "9" * 300,
        "\\frac{1}{" + "9" * 390 + "}",
        "0.\\overline{" + "9" * 380 + "8}",
        "9" * 300 + "!",
        "\\begin{pmatrix}" + "1 & " * 200 + "\\end{pmatrix}",
        "(" + "1," * 400 + "1)",
        "the answer is " * 60,
        "a b " * 200,
        "sqrt(" * 150,
        "\udcff\udcfe",
        "\x1b[2J",
        "import os; os._exit(1)",
        "\\def\\x{\\x}\\x",
        "exec('x')",
    ],
    ids=lambda answer: ascii(answer[:12]),
)
def test_hostile_answers_are_wrong(answer: str, three: Verifier) -> None:
    verdicts = three.check_many([(answer, "42"), (answer, "x+1"), ("x+1", answer)])
    assert not any(verdict.correct for verdict in verdicts)


@pytest.mark.parametrize("digits", [10**5, 10**6])
def test_huge_integers_take_no_time(digits: int) -> None:
    huge = "7" * digits
    start = time.process_time()
    with Verifier() as verifier:
        assert verifier.check(huge, huge) == Verdict(True, "text")
        assert verifier.check(huge, huge[:-1]) == Verdict(False, "too long")
        assert verifier.check(f"\\frac{{{huge}}}{{3}}", "5") == Verdict(False, "too long")
        assert verifier.pids == ()
    assert time.process_time() - start < 2.0  # milliseconds here; digits to a number are quadratic


def test_bytes_that_are_no_text_are_wrong_and_nothing_more(verifier: Verifier) -> None:
    text = bytes(range(256)).decode("utf-8", errors="surrogateescape")
    for answer in (text, f"\\boxed{{{text}}}", f"Final Answer: {text}"):
        assert not verifier.check(extract_answer(answer), "42").correct
        assert not verifier.check(extract_answer(answer), "x+1").correct


def test_a_hard_time_out_costs_the_worker_and_nothing_else() -> None:
    with Verifier(limit_s=1.0) as verifier:
        assert verifier.check("1+x", "x+1") == Verdict(True, "algebra")
        (first,) = verifier.pids
        start = time.monotonic()
        assert verifier.check(TOWER, "3") == Verdict(False, "timeout")
        assert 1.0 <= time.monotonic() - start < 15.0  # a second of the processor, ten by the clock
        assert gone(first)
        assert verifier.check("1+x", "x+1") == Verdict(True, "algebra")
        assert len(verifier.pids) == 1 and verifier.pids != (first,)


@pytest.mark.slow
def test_towers_of_powers_are_wrong_and_cost_one_time_out_each() -> None:
    towers = ["10^{10^{10}}", "2^{2^{2^{2^{2^2}}}}", "x^{" * 100 + "2" + "}" * 100, "(9^9)^{9^9}!"]
    with Verifier(limit_s=1.0) as verifier:
        start = time.monotonic()
        verdicts = verifier.check_many([(tower, "42") for tower in towers])
        assert time.monotonic() - start < 4 * 15.0  # at most ten seconds each, and a new worker behind each
    assert not any(verdict.correct for verdict in verdicts)


@pytest.mark.slow
def test_a_call_full_of_towers_is_given_up_and_the_next_one_is_not() -> None:
    towers = [(f"{base}^{{9^{{9^9}}}}", "3") for base in range(2, 10)]
    with Verifier(limit_s=1.0, most_timeouts=2) as verifier:
        verdicts = verifier.check_many([("1+x", "x+1"), *towers, ("2x", "x+x"), ("7", "7")])
        # Two were tried: it took two limits and not eight.
        assert [v.reason for v in verdicts] == ["algebra", *["timeout"] * 9, "text"]
        assert verdicts[0].correct and verdicts[-1].correct and verifier.pids == ()
        assert verifier.check("2x", "x+x") == Verdict(True, "algebra")


def test_two_workers_answer_in_order_and_solve_equal_pairs_once() -> None:
    pairs = [
        ("1+x", "x+1"),
        (TOWER, "3"),
        ("7", "7"),
        (TOWER, "3"),
        ("2x", "x+x"),
        (r"\sin x", r"\cos x"),
        (TOWER, "3"),
    ]
    with Verifier(limit_s=1.0, workers=2) as verifier:
        verifier.check_many([("a+b", "b+a"), ("a b", "b a")])
        before = set(verifier.pids)
        verdicts = verifier.check_many(pairs)
        assert len(before) == 2 and len(before & set(verifier.pids)) == 1, "one tower, one time-out"
    assert [verdict.correct for verdict in verdicts] == [True, False, True, False, True, False, False]
    assert [verdict.reason for verdict in verdicts[1::2]] == ["timeout", "timeout", "algebra"]


def test_a_worker_that_waits_for_a_processor_is_given_time() -> None:
    """What takes long by the clock and little of the processor is no time-out; what never ends is one."""
    with Verifier(limit_s=0.2) as verifier:
        assert verifier.check("1+x", "x+1").correct
        (pid,) = verifier.pids
        os.kill(pid, signal.SIGSTOP)
        goes_on = threading.Timer(0.7, os.kill, (pid, signal.SIGCONT))
        goes_on.start()
        assert verifier.check("2x", "x+x") == Verdict(True, "algebra") and verifier.pids == (pid,)
        goes_on.join()
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        assert verifier.check("3x", "x+2x") == Verdict(False, "timeout")
        assert time.monotonic() - start >= 2.0 and gone(pid)


def test_a_worker_that_dies_by_itself_is_replaced() -> None:
    with Verifier(limit_s=30.0) as verifier:
        verifier.check("1+x", "x+1")
        (first,) = verifier.pids
        os.kill(first, signal.SIGKILL)
        assert wait_until(lambda: gone(first), 5)
        assert verifier.check("1+x", "x+1").correct
        (second,) = verifier.pids
        killer = threading.Timer(0.3, os.kill, (second, signal.SIGKILL))
        killer.start()
        assert verifier.check(TOWER, "3") == Verdict(False, "crash")
        killer.join()
        assert gone(second) and verifier.check("1+x", "x+1").correct


def test_a_worker_that_cannot_be_started_again_costs_its_pairs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with Verifier(limit_s=30.0) as verifier:
        assert verifier.check("1+x", "x+1").correct
        (first,) = verifier.pids
        os.kill(first, signal.SIGKILL)
        assert wait_until(lambda: gone(first), 5)
        with monkeypatch.context() as short:
            short.setattr(verifier_worker.subprocess, "Popen", no_process)
            pairs = [("1+x", "x+1"), ("2+x", "x+2")]
            assert verifier.check_many(pairs) == [Verdict(False, "crash")] * 2
        assert verifier.check("1+x", "x+1").correct


def test_one_that_never_started_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier_worker.subprocess, "Popen", no_process)
    with Verifier() as verifier, pytest.raises(BlockingIOError):
        verifier.check("1+x", "x+1")


def no_process(*_: object, **__: object) -> None:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def test_it_works_off_the_main_thread(verifier: Verifier) -> None:
    verdicts: list[Verdict] = []
    threads = [
        threading.Thread(target=lambda n=n: verdicts.append(verifier.check(f"{n}+y", f"y+{n}")))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [Verdict(True, "algebra")] * 4


def test_close_and_garbage_collection_end_the_process() -> None:
    verifier = Verifier()
    verifier.check("1+x", "x+1")
    (first,) = verifier.pids
    verifier.close()
    assert gone(first) and verifier.pids == ()
    assert verifier.check("1+x", "x+1").correct
    (second,) = verifier.pids
    del verifier
    assert wait_until(lambda: gone(second), 5)


def parent(code: str) -> subprocess.Popen[str]:
    """A process that makes a verifier `v` with a limit of 1 s, prints its worker's pid and runs `code`."""
    head = (
        "from megatron_parallel_r1.rewards.verifier import Verifier; v = Verifier(limit_s=1.0); "
        "v.check('1+x', 'x+1'); print(v.pids[0], flush=True); "
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )


def test_the_interpreters_end_leaves_no_process() -> None:
    with parent("pass") as process:
        assert process.stdout
        verifier_worker = int(process.stdout.readline())
    assert process.returncode == 0 and gone(verifier_worker)


@pytest.mark.parametrize("code", ["import time; time.sleep(60)", f"v._limit_s = 60; v.check('{TOWER}', '3')"])
def test_a_killed_parent_leaves_no_process(code: str) -> None:
    with parent(code) as process:
        assert process.stdout
        verifier_worker = int(process.stdout.readline())
        time.sleep(0.5)  # the worker is idle, or deep in one multiplication
        assert not gone(verifier_worker)
        process.kill()
    # The endless one ends after 2 s of processor time, which on a loaded machine takes longer by the clock.
    assert wait_until(lambda: gone(verifier_worker), 120)
