"""A user's reward: its forms, what it may return, time limits, and how its faults are reported."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards import user_calls
from megatron_parallel_r1.rewards.base import JudgedTrace, Reward, Score, reward_metrics
from megatron_parallel_r1.rewards.format_check import Format
from megatron_parallel_r1.rewards.registry import make_component, make_reward
from megatron_parallel_r1.rewards.schedule import Constant
from megatron_parallel_r1.rewards.user_calls import CallLimits

OWN = """
import asyncio, sys, threading, time
import numpy as np, torch

SEEN = []
AT_ONCE = most = 0
HELD = threading.Event()

def length(judged, step): return len(judged.response) + step
async def later(judged, step):
    await asyncio.sleep(0)
    return len(judged.response) + step
class Object:
    async def __call__(self, judged, step): return len(judged.response) + step
instance = Object()

def columns(completions, level, **kwargs):
    SEEN.append(sorted(kwargs))
    return [len(text) + hard for text, hard in zip(completions, level)]
async def columns_later(completions, level, **kwargs): return columns(completions, level, **kwargs)
def everything(**kwargs): return np.array([float(len(p)) for p in kwargs["prompts"]])
def tensors(prompts, completions, completion_ids): return torch.tensor([len(i) for i in completion_ids])
def strict(completions, no_such_column): return [0.0] * len(completions)
def by_position(completions, /): return [0.0] * len(completions)

def none(judged, step): return None if judged.response == "b" else 1.0
def some(completions, **kwargs): return [None if text == "b" else 1 for text in completions]

def raises(judged, step):
    if judged.response == "b": raise ZeroDivisionError("by nothing\\nat all")
    return 0.0
async def raises_later(judged, step): raises(judged, step); return 0.0
def exits(judged, step): sys.exit(0)
async def exits_later(judged, step): sys.exit(0)
def cancels(judged, step): raise asyncio.CancelledError
async def cancels_later(judged, step): raise asyncio.CancelledError
def impatient(judged, step): raise TimeoutError("its own")
def two(judged, step): return torch.tensor([1.0, 2.0])
def endless(judged, step): return float("inf")
def words(judged, step): return "many"
def huge(judged, step): return 10**400
def nested(judged, step): return [1.0]
def tall(judged, step): return "x" * 10_000
def coroutine(judged, step): return later(judged, step)

def raises_whole(completions, **kwargs): raise KeyError("level")
def fewer(completions, **kwargs): return [0.0]
def single(completions, **kwargs): return 0.5
def mapping(completions, **kwargs): return {text: 0.0 for text in completions}
def square(completions, **kwargs): return torch.zeros(len(completions), 2)
def one_nan(completions, **kwargs): return [0.0, float("nan"), 0.0]

def hangs(judged, step):
    if judged.response == "b": HELD.wait(600)
    return 1.0
async def hangs_later(judged, step):
    if judged.response == "b": await asyncio.sleep(600)
    return 1.0
async def blocks(judged, step): HELD.wait(600)
def hangs_whole(completions, **kwargs): HELD.wait(600)

def met(judged, step, meeting=threading.Barrier(3)):
    meeting.wait(60)  # passes when three calls are under way at once
    return 1.0
async def met_later(judged, step):
    global AT_ONCE, most
    AT_ONCE += 1
    most = max(most, AT_ONCE)
    for _ in range(5): await asyncio.sleep(0)
    AT_ONCE -= 1
    return float(most)
async def loop_of(judged, step): return float(id(asyncio.get_running_loop()) % 2**40)
def thread_of(judged, step): return float(threading.current_thread() is threading.main_thread())
"""


@pytest.fixture(scope="module", autouse=True)
def own(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("own")
    (folder / "own_terms.py").write_text(OWN)
    (folder / "own_exit.py").write_text("raise SystemExit('no licence')")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield
        import own_terms  # type: ignore[import-not-found]

        own_terms.HELD.set()


def trace(response: str, **other: object) -> JudgedTrace:
    return JudgedTrace(False, Format(), None, "text", response=response, **other)


BATCH = [
    trace("aaa", columns={"level": 1}, question="q", tokens=(1, 2)),
    trace("b", columns={"level": 5, "topic": "sums"}, question="qq", tokens=(3,)),
    trace("cc", columns={"level": 2}, question="", tokens=()),
]


def scored(name: str, step: int = 0, **limits: object) -> list[float | None]:
    reward = make_reward(f"own_terms:{name}", None, CallLimits(**limits))
    return [score.total for score in reward.score_all(BATCH, step, first=4)]


@pytest.mark.parametrize("limits", [{}, {"concurrent": 2}, {"timeout_s": 60.0}], ids=str)
@pytest.mark.parametrize("name", ["length", "later", "instance"])
def test_a_function_of_one_trace_plain_or_async(name: str, limits: dict[str, object]) -> None:
    assert scored(name, step=10, **limits) == [13, 11, 12]


@pytest.mark.parametrize("limits", [{}, {"timeout_s": 60.0}], ids=str)
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("columns", [4, 6, 4]),
        ("columns_later", [4, 6, 4]),
        ("everything", [1, 2, 0]),
        ("tensors", [2, 1, 0]),
    ],
)
def test_a_batched_function_in_the_form_of_trl(
    name: str, values: list[float], limits: dict[str, object]
) -> None:
    assert scored(name, **limits) == values


def test_a_batched_function_gets_every_column_and_more() -> None:
    import own_terms

    scored("columns")
    assert own_terms.SEEN[-1] == ["completion_ids", "judged", "prompts", "references", "step", "topic"]


def test_a_parameter_must_be_a_column_of_the_data() -> None:
    (term,) = make_reward("own_terms:strict").user_terms
    with pytest.raises(UserError, match="strict: there is no no_such_column; take some of prompts, compl"):
        term.check_columns(["level"])
    term.check_columns(["no_such_column"])
    with pytest.raises(UserError, match=r"it cannot be called as by_position\(judged, step\); give it two"):
        make_reward("own_terms:by_position")
    with pytest.raises(UserError, match=r"cannot import own_exit \(SystemExit: no licence"):
        make_reward("own_exit:f")


@pytest.mark.parametrize("name", ["none", "some"])
def test_none_is_no_signal(name: str) -> None:
    assert scored(name) == [1.0, None, 1.0]
    mixed = Reward(
        (make_component("accuracy"), make_component(f"own_terms:{name}", weight=Constant(value=2.0)))
    )
    scores = mixed.score_all(BATCH, 0)
    assert scores[0] == Score(1.0, {"accuracy": -1.0, name: 2.0})
    assert scores[1] == Score(None, {"accuracy": -1.0, name: None})
    assert reward_metrics(scores) == {"reward": 1.0, "reward_accuracy": -1.0, f"reward_{name}": 2.0}
    assert reward_metrics(scores[1:2])["reward"] is None
    idle = Reward(
        (make_component("accuracy"), make_component("own_terms:raises", weight=Constant(value=0.0)))
    )
    assert [score.total for score in idle.score_all(BATCH, 0)] == [-1.0] * 3


@pytest.mark.parametrize("limits", [{}, {"concurrent": 2}, {"timeout_s": 60.0}], ids=str)
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("raises", "trace 5: ZeroDivisionError: by nothing at all, own_terms.py line"),
        ("raises_later", "trace 5: ZeroDivisionError: by nothing at all, own_terms.py line"),
        ("exits", "trace 4: SystemExit: 0"),
        ("exits_later", "trace 4: SystemExit: 0"),
        ("cancels", "trace 4: CancelledError"),
        ("cancels_later", "trace 4: CancelledError"),
        ("impatient", "trace 4: TimeoutError: its own"),
        ("two", "trace 4: it returned tensor([1., 2.]); return a finite number, or None"),
        ("endless", "trace 4: it returned inf; return a finite number"),
        ("words", "trace 4: it returned 'many'; return a finite number"),
        ("huge", "trace 4: it returned 1000"),
        ("nested", "trace 4: it returned [1.0]; return a finite number"),
        ("tall", "xxx…; return a finite number"),
        ("raises_whole", "traces 4 to 6: KeyError: 'level'"),
        ("fewer", "traces 4 to 6: it returned 1 values for 3 traces ([0.0]); return a list"),
        ("single", "traces 4 to 6: it returned no list for 3 traces (0.5)"),
        ("mapping", "traces 4 to 6: it returned no list for 3 traces ({"),
        ("square", "trace 4: it returned tensor([0., 0.])"),
        ("one_nan", "trace 5: it returned nan"),
    ],
)
def test_a_fault_is_one_line_with_function_step_and_trace(
    name: str, what: str, limits: dict[str, object]
) -> None:
    with pytest.raises(UserError, match=re.escape(what)) as caught:
        scored(name, step=2, **limits)
    assert str(caught.value).startswith(f"reward own_terms:{name}, step 3, trace")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_plain_function_that_returns_a_coroutine() -> None:
    with pytest.raises(UserError, match="it returned <coroutine object later"):
        scored("coroutine")


@pytest.mark.parametrize("name", ["hangs", "hangs_later"])
def test_a_call_beyond_its_time_limit_leaves_its_trace_out(name: str) -> None:
    reward = make_reward(f"own_terms:{name}", None, CallLimits(0.1, 3))
    scores = reward.score_all([trace("b")] * 4, 0)
    assert [(score.total, score.timeouts) for score in scores] == [(None, 1)] * 4


def test_a_batch_beyond_its_time_limit_has_no_reward() -> None:
    assert scored("hangs_whole", timeout_s=0.1) == [None] * 3


def test_an_async_function_that_blocks_is_named(monkeypatch) -> None:
    monkeypatch.setattr(user_calls, "BLOCKED_S", 0.1)
    with pytest.raises(UserError, match="traces 4 to 6: its async function blocks the others; await"):
        scored("blocks", timeout_s=0.1)


def test_calls_at_once() -> None:
    assert scored("met", concurrent=3) == [1.0] * 3
    assert max(scored("met_later", concurrent=1)) == 1
    assert max(scored("met_later", concurrent=2)) == 2


def test_an_async_function_keeps_its_event_loop_and_a_plain_one_its_thread() -> None:
    reward = make_reward("own_terms:loop_of")
    loops = {score.total for step in range(3) for score in reward.score_all(BATCH, step)}
    assert len(loops) == 1
    in_main = float(threading.current_thread() is threading.main_thread())
    assert scored("thread_of") == [in_main] * 3
