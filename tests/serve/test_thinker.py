"""`ParallelThinker`: the Python API, without the extras of the server."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from megatron_parallel_r1 import ParallelThinker
from megatron_parallel_r1.errors import UserError
from tests.serve.release import ODD, write_release


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> ParallelThinker:
    return ParallelThinker.load(write_release(tmp_path_factory.mktemp("release")))


def test_responses_come_in_order_and_repeat_with_their_seed(thinker: ParallelThinker) -> None:
    responses = thinker.generate(["w11 w12", "w13"], samples=2, seed=4, max_tokens=200)
    assert [response.problem for response in responses] == ["w11 w12", "w11 w12", "w13", "w13"]
    assert len({response.text for response in responses}) == 4
    (alone,) = thinker.generate("w13", seed=6, max_tokens=200)
    assert alone.text == str(responses[2])
    for response in responses:
        assert response.tokens <= 200 and response.critical_tokens <= response.tokens
        blocks = [part for part in response.parts if part["kind"] == "block"]
        assert len(blocks) == response.blocks and all(len(block["paths"]) == 3 for block in blocks)
    assert sum(response.blocks for response in responses) > 0


def test_settings_replace_those_of_the_training(thinker: ParallelThinker) -> None:
    four = thinker.generate("w11", paths=4, samples=4, max_tokens=400)
    parts = [part for response in four for part in response.parts]
    assert {len(part["paths"]) for part in parts if part["kind"] == "block"} == {4}
    greedy = thinker.generate("w11", temperature=0, samples=2, max_tokens=40)
    assert greedy[0].text == greedy[1].text
    (chain,) = thinker.generate("w11", mode="sequential", max_tokens=60)
    assert chain.blocks == 0 and chain.critical_tokens == chain.tokens
    for settings, message in (
        ({"paths": 9}, "paths: .* 8"),
        ({"mode": "loud"}, "mode"),
        ({"max_tokens": 10**6}, "lower max_tokens or shorten the problem"),
    ):
        with pytest.raises(UserError, match=message):
            thinker.generate("w11", **settings)


def test_it_works_inside_a_running_event_loop(thinker: ParallelThinker) -> None:
    async def cell() -> str:
        return thinker.generate("w11", max_tokens=40)[0].text

    assert asyncio.run(cell()) == thinker.generate("w11", max_tokens=40)[0].text


def test_a_notebook_shows_the_tree_and_runs_nothing(thinker: ParallelThinker) -> None:
    responses = thinker.generate(f"w11 {ODD[1]}", samples=8, max_tokens=600)
    response = max(responses, key=lambda each: each.blocks)
    html = response._repr_html_()
    assert html.count('class="path ') == 3 * response.blocks > 0
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert f"{response.tokens} tokens, {response.critical_tokens} on the critical path" in html
    assert repr(response).startswith("Response(answer=")


def test_the_import_is_quiet_and_lazy() -> None:
    code = (
        "import sys, megatron_parallel_r1\n"
        "assert 'torch' not in sys.modules\n"
        "from megatron_parallel_r1 import ParallelThinker\n"
        "assert not {'fastapi', 'uvicorn'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
