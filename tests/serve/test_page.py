"""The page in a real browser: a person types a problem and watches the paths grow side by side."""

from __future__ import annotations

import base64
import json
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.browser import CHROMIUM, Page, browser
from tests.serve.release import EXAMPLES, ODD
from tests.serve.server import PROMPT, chat, wait_until_idle

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")

# Notes, at every change, how long each path of the first block is, and its summary.
WATCH = """
window.seen = [];
new MutationObserver(() => {
  const block = document.querySelector(".block");
  const length = (node) => node?.querySelector(".text")?.textContent.length ?? 0;
  const paths = [...(block?.querySelectorAll(".path") ?? [])].map(length);
  window.seen.push([...paths, length(block?.querySelector(".summary"))]);
}).observe(document.querySelector("#thought"), { childList: true, subtree: true, characterData: true });
"""
RESPONSE = "document.querySelector('#thought').innerText + document.querySelector('#size dl').innerText"
SAID = "document.querySelector('#status').textContent"
SHOWN = """(() => {
  const text = (node) => [...node.children].filter((c) => c.className === "text").map((c) => c.textContent);
  return [...document.querySelectorAll(".block")].map((block) => ({
    paths: [...block.querySelectorAll(".path")].map((p) => text(p).join("")),
    summary: text(block.querySelector(".summary") ?? block).join(""),
    lefts: [...block.querySelectorAll(".path")].map((p) => p.getBoundingClientRect().left),
    tops: [...block.querySelectorAll(".path")].map((p) => p.getBoundingClientRect().top),
  }));
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def status(page: Page) -> str:
    return page.run("document.querySelector('#status').textContent")


def wait_for_status(page: Page, start: str, seconds: float = 30) -> str:
    end = time.monotonic() + seconds
    while not (shown := status(page)).startswith(start):
        assert time.monotonic() < end, f"the page says {shown!r}, not {start!r}"
        time.sleep(0.01)
    return shown


def ask(page: Page, client: httpx.Client, seed: int, problem: str = PROMPT, **shape: Any) -> None:
    page.open(str(client.base_url), **shape)
    page.run(f"document.querySelector('[name=seed]').value = {seed}")
    page.run(WATCH)
    page.type(problem)
    page.press("Enter")


@pytest.fixture(scope="module")
def seed(client: httpx.Client) -> int:
    """Of a response that ends, whose first block has two paths of some length and a summary."""

    def fits(seed: int) -> bool:
        choice = client.post("/v1/chat/completions", json=chat(seed=seed)).json()["choices"][0]
        blocks = choice["parallel"]["blocks"]
        if choice["finish_reason"] != "stop" or len(blocks) < 2 or not all(b["summary"] for b in blocks):
            return False
        long_paths = [path for path in blocks[0]["paths"] if path["tokens"] > 8]
        return len(long_paths) >= 2 and blocks[0]["summary"]["tokens"] > 4

    return next(filter(fits, range(500)))


def shoot(page: Page, tmp_path: Path, name: str) -> None:
    page.shoot(Path(os.environ.get("PARALLEL_R1_SHOTS") or tmp_path) / f"{name}.png")


def same_words(shown: str, expected: str) -> bool:
    return shown.split() == expected.split()


def were_side_by_side(page: Page) -> bool:
    """Whether two paths of the first block grew at a time when its summary had not begun."""
    seen = page.run("window.seen")
    grown = [lengths for lengths in seen if len(lengths) == len(seen[-1])]
    before = [lengths for lengths in grown if lengths[-1] == 0]
    return any(sum(0 < a < z for a, z in zip(ls, grown[-1], strict=True)) >= 2 for ls in before)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_paths_grow_side_by_side_then_the_summary(
    page: Page, client: httpx.Client, seed: int, tmp_path: Path, width: int, dark: bool
) -> None:
    # A browser that gets no CPU time while the answer comes draws all of it at once: then it is asked again.
    for _ in range(5):
        ask(page, client, seed, width=width, dark=dark)
        final_status = wait_for_status(page, "Done")
        if were_side_by_side(page):
            break
    else:
        pytest.fail("two paths were never seen to grow at once before the summary")
    shoot(page, tmp_path, f"done-{width}-{'dark' if dark else 'light'}")
    expected = client.post("/v1/chat/completions", json=chat(seed=seed)).json()
    usage = expected["usage"]
    assert f"{usage['completion_tokens']} tokens" in final_status
    assert f"{usage['completion_tokens_details']['critical_path_tokens']} of them" in final_status
    blocks = expected["choices"][0]["parallel"]["blocks"]
    shown = page.run(SHOWN)
    assert len(shown) == len(blocks)
    for seen, block in zip(shown, blocks, strict=True):
        for path, expected_path in zip(seen["paths"], block["paths"], strict=True):
            assert same_words(path, "".join(expected_path["texts"]))
        assert same_words(seen["summary"], block["summary"]["text"])
        assert sorted(set(seen["lefts"])) == seen["lefts"] and len(set(seen["tops"])) == 1, "no columns"
    assert page.run("window.seen")[-1][-1] > 0
    assert page.run("document.documentElement.scrollWidth <= innerWidth"), "the page is too wide"
    colour = page.run("getComputedStyle(document.body).backgroundColor")
    assert (colour == "rgb(18, 22, 28)") == dark
    assert page.problems == []


def test_what_the_model_writes_is_text(page: Page, client: httpx.Client) -> None:
    seed = next(
        seed
        for seed in range(100)
        if all(word in str(client.post("/v1/chat/completions", json=chat(seed=seed)).json()) for word in ODD)
    )
    ask(page, client, seed)
    wait_for_status(page, "Done")
    words = page.run("document.querySelector('#thought').textContent")
    assert all(word in words for word in ODD)
    assert page.run("document.querySelectorAll('#thought :is(b, script, img)').length") == 0
    assert page.run("document.title") == "tiny · thinking in parallel"
    assert page.problems == []


def test_the_policy_lets_no_foreign_script_run(page: Page, client: httpx.Client) -> None:
    page.open(str(client.base_url))
    page.run("""
        const script = document.createElement("script");
        script.textContent = "window.ran = 1";
        document.body.append(script);
    """)
    assert page.run("window.ran ?? 0") == 0
    assert any("Content Security Policy" in problem for problem in page.problems)
    page.problems.clear()


def test_by_keyboard_alone_it_can_be_stopped(page: Page, client: httpx.Client, tmp_path: Path) -> None:
    lengths = {
        seed: client.post("/v1/chat/completions", json=chat(seed=seed, parallel={"paths": 8})).json()["usage"]
        for seed in range(30)
    }
    longest = max(lengths, key=lambda seed: lengths[seed]["completion_tokens"])
    page.open(str(client.base_url))
    assert page.run("document.activeElement.name") == "problem"
    page.type(PROMPT)
    for name, text in (("paths", "8"), ("seed", str(longest))):
        page.press("Tab")
        assert page.run("document.activeElement.name") == name
        page.run("document.activeElement.select()")
        page.type(text)
    page.press("Enter")
    wait_for_status(page, "Thinking")
    page.press("Escape")
    wait_for_status(page, "Stopped")
    shoot(page, tmp_path, "stopped")
    assert wait_until_idle(client)["running"] == 0
    page.run("document.querySelector('[name=paths]').value = 3")
    page.run("document.querySelector('[name=seed]').value = 3")
    page.press("Enter")
    wait_for_status(page, "Done")
    assert page.problems == []


def test_a_refusal_is_told_and_the_key_is_asked_for(page: Page, narrow: httpx.Client, tmp_path: Path) -> None:
    ask(page, narrow, 1)
    assert "API key" in wait_for_status(page, "It did not work")
    assert page.run("document.activeElement.name") == "key"
    page.type("no key of ours")
    page.press("Enter")
    assert "API key" in wait_for_status(page, "It did not work")
    shoot(page, tmp_path, "refused")
    assert all("401" in problem for problem in page.problems)
    page.problems.clear()


def done(page: Page) -> str:
    """What the page shows of the response, and its size."""
    wait_for_status(page, "Done")
    return page.run(RESPONSE)


def test_an_example_is_posed_and_unknown_words_are_named(page: Page, client: httpx.Client) -> None:
    page.open(str(client.base_url))
    examples = "[...document.querySelectorAll('.examples button')]"
    assert page.run(f"{examples}.map((b) => b.textContent)") == EXAMPLES
    page.run(f"document.querySelector('[name=seed]').value = 2; {examples}[1].click()")
    wait_for_status(page, "Done")
    assert page.run("document.querySelector('[name=problem]').value") == EXAMPLES[1]
    assert "does not know '<b>unheard</b>'" in page.run("document.querySelector('#warnings').innerText")
    page.run(f"{examples}[0].click()")
    done(page)
    assert page.run("document.querySelector('#warnings').hidden")
    assert page.problems == []


def test_a_link_shows_the_same_trace_without_the_server(
    page: Page, client: httpx.Client, seed: int, tmp_path: Path
) -> None:
    ask(page, client, seed)
    before = done(page)
    usage = client.post("/v1/chat/completions", json=chat(seed=seed)).json()["usage"]
    critical = usage["completion_tokens_details"]["critical_path_tokens"]
    bars = page.run("[...document.querySelectorAll('#size i')].map((b) => b.getBoundingClientRect().width)")
    assert bars[1] / bars[0] == pytest.approx(critical / usage["completion_tokens"], rel=0.05)
    page.run("document.querySelector('.link').click()")
    page.wait("location.hash.startsWith('#trace=')")
    link = page.run("location.href").split("#")[1]
    requests = client.get("/metrics").text
    page.open(f"{client.base_url}#{link}", ready="!document.querySelector('#size').hidden")
    assert status(page).startswith("From a link: a trace of tiny.")
    assert page.run(RESPONSE) == before
    assert page.run("[document.forms[0].problem.value, document.forms[0].seed.value]") == [PROMPT, str(seed)]
    assert client.get("/metrics").text == requests
    assert page.problems == []


@pytest.mark.parametrize("trace", [None, {"problem": 7}, {"problem": "w8", "deltas": [{"at": ["<b>"]}]}])
def test_a_damaged_link_is_named(page: Page, client: httpx.Client, trace: dict[str, Any] | None) -> None:
    page.open(f"{client.base_url}#{packed(trace) if trace else 'trace=!'}", ready=SAID)
    assert status(page).startswith("The link is damaged: ")
    assert page.run("document.querySelector('#thought').childNodes.length") == 0


def test_a_path_has_its_own_answer_and_those_that_agree_are_marked(page: Page, client: httpx.Client) -> None:
    answers = ["30", "32", "30", None]
    deltas: list[dict[str, Any]] = [{"at": [], "part": "main", "text": "first "}]
    for index, answer in enumerate(answers):
        deltas.append({"at": [1, index], "part": "path", "text": "words", "closed": True, "answer": answer})
    deltas.append({"at": [1], "part": "summary", "text": "<b>both</b>", "closed": True})
    trace = {"problem": "w8", "model": "m", "tokens": 9, "critical": 3, "complete": True, "deltas": deltas}
    page.open(f"{client.base_url}#{packed(trace)}", ready=SAID)
    shown = page.run("""[...document.querySelectorAll(".path")].map((path) => {
        const answer = path.querySelector(".answer");
        return answer && [answer.textContent, answer.classList.contains("agreed")];
    })""")
    assert shown == [["30", True], ["32", False], ["30", True], None]
    assert "<b>both</b>" in page.run("document.querySelector('.summary').textContent")


def packed(trace: dict[str, Any]) -> str:
    """The part of a link behind the #."""
    deflate = zlib.compressobj(wbits=-15)
    data = deflate.compress(json.dumps(trace).encode()) + deflate.flush()
    return f"trace={base64.urlsafe_b64encode(data).decode().rstrip('=')}"
