"""The report in a real browser: charts with zoom and values, runs compared, traces, a watched run."""

from __future__ import annotations

import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_parallel_r1.report.html import build_report
from megatron_parallel_r1.report.watch import make_server
from tests.serve.browser import CHROMIUM, Page, browser
from tests.unit.report.synthetic import write_lines, write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
READY = "document.documentElement.classList.contains('js')"
DRAWN = f"{READY} && document.querySelectorAll('.panel path.curve').length > 10"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return write_run(folder / "tiny"), write_run(folder / "other", seed=1)


@pytest.fixture(scope="module")
def report(runs: tuple[Path, Path]) -> str:
    return build_report(runs[0]).as_uri()


def shoot(page: Page, tmp_path: Path, name: str) -> None:
    page.shoot(Path(os.environ.get("PARALLEL_R1_SHOTS") or tmp_path) / f"{name}.png")


def plot_box(page: Page, title: str) -> tuple[float, float, float, float]:
    """Left, top, width and height of a chart in the view, after it was scrolled there."""
    title_of = "(panel) => panel.querySelector('h4').textContent"
    found = f"[...document.querySelectorAll('.panel')].find((p) => ({title_of})(p) === '{title}')"
    page.run(f"window.panel = {found}; panel.scrollIntoView({{ block: 'center' }})")
    left, top, width, height = page.run(
        "(() => { const b = panel.querySelector('.plot').getBoundingClientRect();"
        "return [b.left, b.top, b.width, b.height]; })()"
    )
    return left, top, width, height


def axis(page: Page) -> list[str]:
    """The labels under the chart of `plot_box`."""
    return page.run("[...panel.querySelectorAll('text[text-anchor=middle]')].map((t) => t.textContent)")


def tip(page: Page) -> str:
    shown = "(() => { const t = panel.querySelector('.reading-off'); return t.hidden ? '' : t.innerText; })()"
    return page.run(shown)


def drag(page: Page, start: tuple[float, float], stop: tuple[float, float]) -> None:
    page.mouse("mousePressed", *start)
    page.mouse("mouseMoved", *stop)
    page.mouse("mouseReleased", *stop)


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_nothing_is_cut_at_any_width(
    page: Page, runs: tuple[Path, Path], tmp_path: Path, width: int, dark: bool
) -> None:
    for name, folders in (("run", runs[:1]), ("compared", runs)):
        report = build_report(*folders, out=tmp_path / f"{name}.html")
        page.open(report.as_uri(), width=width, dark=dark, ready=DRAWN)
        shoot(page, tmp_path, f"report-{name}-{width}")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        cut = "[...document.querySelectorAll('.table')].filter((t) => t.scrollWidth > t.clientWidth).length"
        assert page.run(cut) == 0
        assert page.run("getComputedStyle(document.body).backgroundColor") == (
            "rgb(18, 22, 28)" if dark else "rgb(246, 247, 249)"
        )
    assert page.problems == []


def test_values_are_read_off_and_zoomed_charts_follow_each_other(page: Page, report: str) -> None:
    page.open(report, width=1400, ready=DRAWN)
    left, top, width, height = plot_box(page, "Accuracy")
    assert axis(page) == ["0", "50", "100", "150"]
    middle = top + height / 2
    page.mouse("mouseMoved", left + width - 14, middle)
    assert re.match(
        r"rl_hard, step 1(19|20)\s+\d+\.\d %\s+held-out after rl_hard, step 120 64\.2 %", tip(page)
    )
    page.mouse("mouseMoved", left + 60, middle)
    assert re.match(r"rl_easy, step \d+\s+\d+\.\d %", tip(page))
    drag(page, (left + width / 2, middle), (left + width * 0.75, middle))
    zoomed = [int(step) for step in axis(page)]
    assert zoomed[0] > 60 and zoomed[-1] < 130
    plot_box(page, "Length")
    assert [int(step) for step in axis(page)] == zoomed
    plot_box(page, "Loss of SFT")
    assert axis(page)[-1] == "400", "a chart of another kind followed"
    left, top, width, height = plot_box(page, "Length")
    assert page.run("panel.querySelector('.reset').hidden") is False
    for clicks in (1, 2):
        page.mouse("mousePressed", left + width / 2, top + 90, clicks)
        page.mouse("mouseReleased", left + width / 2, top + 90, clicks)
    assert axis(page) == ["0", "50", "100", "150"]
    assert page.run("panel.querySelector('.reset').hidden") is True


def test_a_tap_reads_a_value_off_and_zooms_nothing(page: Page, report: str) -> None:
    page.open(report, width=390, ready=DRAWN)
    left, top, width, height = plot_box(page, "Length")
    page.tap(left + width / 2, top + height / 2)
    assert re.match(r"rl_hard, step \d+\s+response \d+(\.\d)?\s+critical path \d+", tip(page))
    assert page.run("panel.querySelector('.reset').hidden") is True


def test_a_line_and_a_run_can_be_switched_off(page: Page, runs: tuple[Path, Path], tmp_path: Path) -> None:
    page.open(build_report(*runs, out=tmp_path / "two.html").as_uri(), width=1400, ready=DRAWN)
    left, top, width, _ = plot_box(page, "Length")
    page.mouse("mouseMoved", left + width - 14, top + 90)
    names = re.findall(r"^((?:tiny|other), [a-z ]+) [\d.]+$", tip(page), re.MULTILINE)
    assert names == ["tiny, response", "tiny, critical path", "other, response", "other, critical path"]
    page.run("panel.querySelectorAll('.legend button')[1].click()")
    page.run("document.querySelectorAll('.runs button')[0].click()")
    page.mouse("mouseMoved", left + width - 15, top + 90)
    assert re.findall(r"(\w+), response|critical", tip(page)) == ["other"]
    assert page.run("document.querySelectorAll('.panel .c0').length") == 0


def test_evaluations_of_stages_are_drawn_with_their_interval(page: Page, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tiny")
    write_lines(
        folder / "rl_hard/evaluations.jsonl",
        [
            {
                "kind": "evaluation",
                "stage": "rl_hard",
                "step": step,
                "set": "hard",
                "mode": mode,
                "accuracy": 0.4,
                "accuracy_low": 0.3,
                "accuracy_high": 0.5,
            }
            for step in (0, 60, 120)
            for mode in ("isolated", "sequential")
        ],
    )
    page.open(build_report(folder).as_uri(), width=1400, ready=DRAWN)
    left, top, width, _ = plot_box(page, "Accuracy of evaluations")
    page.mouse("mouseMoved", left + width / 2, top + 90)
    expected = (
        "rl_hard, step 60\nhard, isolated 40.0 % [30.0 %, 50.0 %]\nhard, sequential 40.0 % [30.0 %, 50.0 %]"
    )
    assert [line.strip() for line in tip(page).splitlines() if line.strip()] == expected.splitlines()
    assert page.run("panel.querySelectorAll('path.band').length") == 2


def choose(page: Page, **choices: str) -> list[str]:
    """Sets fields of the filters; returns stage, step and verdict of the open trace, and its place."""
    for name, value in choices.items():
        page.run(
            f"(() => {{ const field = document.querySelector('.filters')[{json.dumps(name)}];"
            f"field.value = {json.dumps(value)}; field.dispatchEvent(new Event('change')); }})()"
        )
    return page.run("""(() => {
        const open = [...document.querySelectorAll(".trace")].filter((t) => t.getClientRects().length);
        const [{ dataset }] = open;
        const { textContent } = document.querySelector("output");
        return [open.length, dataset.stage, dataset.step, dataset.verdict, textContent];
    })()""")


def test_traces_are_chosen_turned_and_linked(page: Page, report: str) -> None:
    page.open(f"{report}#trace-3", width=1400, ready=READY)
    assert page.run("document.querySelector('.trace.chosen').id") == "trace-3"
    page.open(report, width=1400, ready=READY)
    assert choose(page)[:4] == [1, "rl_hard", "120", "right"]
    assert choose(page, stage="rl_easy")[:4] == [1, "rl_easy", "40", "right"]
    assert choose(page, kind="wrong")[:4] == [1, "rl_easy", "40", "wrong"]
    before = choose(page, step="5")
    assert before[:4] == [1, "rl_easy", "5", "wrong"]
    page.run(
        "document.querySelector('[name=next]').click(), document.querySelector('[name=previous]').click()"
    )
    assert choose(page) == before
    assert page.problems == []


def test_malformed_and_longest_traces_come_first(page: Page, report: str) -> None:
    page.open(report, width=1400, ready=READY)
    *_, verdict, place = choose(page, kind="malformed")
    assert (verdict, place[-4:]) == ("wrong", "of 2")
    choose(page, kind="", order="longest")
    lengths = page.run("""[...document.querySelectorAll(".chips button")].map((chip) => {
        chip.click();
        return Number(document.querySelector(".trace.chosen").dataset.length);
    })""")
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 3


def test_a_trace_is_a_tree_with_each_paths_answer(page: Page, report: str, tmp_path: Path) -> None:
    page.open(report, width=1400, ready=READY)
    choose(page, view="tree")
    paths = page.run("""[...document.querySelectorAll(".trace.chosen .path")].map((path) => {
        const { left, top } = path.getBoundingClientRect();
        return [Math.round(left), top, path.querySelector(".label").innerText.replace(/\\s+/g, " ")];
    })""")
    lefts, tops, labels = zip(*paths, strict=True)
    assert list(tops) == sorted(tops)
    assert labels[0] == "✓ right Path 1 = 30" or labels[0].replace("\u00a0", " ").endswith("30")
    assert len(set(lefts)) == 2, "the paths of the inner block stand further right"
    shoot(page, tmp_path, "report-tree")
    assert page.run("document.documentElement.scrollWidth <= innerWidth")


def ask(url: str, **headers: str) -> tuple[int, bytes, str | None]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as reply:
            return reply.status, reply.read(), reply.headers["ETag"]
    except urllib.error.HTTPError as error:
        return error.code, error.read(), None


def test_a_watched_page_follows_the_run_and_keeps_the_zoom(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "early"
    folder.mkdir()
    with make_server([folder], 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/"
            assert ask(url)[0] == 503 and b"no run in this folder" in ask(url)[1]
            assert ask(url, Host="elsewhere.example")[0] == 403
            assert ask(f"{url}secret")[0] == 404
            metrics: list[dict[str, Any]] = [
                {"kind": "rl", "step": step, "accuracy": 0.5, "reward": step} for step in range(1, 41)
            ]
            write_lines(folder / "rl/metrics.jsonl", metrics)
            status, content, version = ask(url)
            assert status == 200 and version is not None and b"connect-src 'self'" in content
            assert ask(url, **{"If-None-Match": version})[0] == 304
            page.open(url, width=1400, ready=f"{READY} && document.querySelector('path.curve')")
            left, top, width, _ = plot_box(page, "Reward")
            drag(page, (left + 60, top + 90), (left + width / 2, top + 90))
            zoomed = axis(page)
            write_lines(folder / "rl/metrics.jsonl", [*metrics, metrics[0] | {"step": 80}])
            page.wait("document.querySelector('.facts').textContent.includes('80 steps')")
            plot_box(page, "Reward")
            assert axis(page) == zoomed
            page.run("document.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }))")
            assert axis(page)[-1] == "80"
        finally:
            server.shutdown()
            thread.join()
    page.wait("document.querySelector('#live').textContent === 'the server has ended'")
    assert all("Failed to load" in problem for problem in page.problems)
    page.problems.clear()
