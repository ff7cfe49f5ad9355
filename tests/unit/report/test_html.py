"""The report of a made-up run: complete, escaped, self-contained, small."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.report.charts import page_charts
from megatron_parallel_r1.report.html import build_report
from megatron_parallel_r1.report.run_folder import read_run
from megatron_parallel_r1.report.showcase import MAX_BYTES, choose_traces
from megatron_parallel_r1.report.watch import serve_report
from tests.unit.report.synthetic import CONFIG, HOSTILE, STAGES, write_lines, write_run

LOADS = ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background")


class Page(HTMLParser):
    """Collects tags with their attributes, ids and the text of each element kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str, name: str = "") -> list[dict[str, str | None]]:
        found = [attributes for other, attributes in self.tags if other == tag]
        return [a for a in found if not name or name in (a.get("class") or "").split()]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_report(write_run(tmp_path_factory.mktemp("runs") / "tiny")).read_text()


@pytest.fixture(scope="module")
def page(report: str) -> Page:
    return Page(report)


def data_of(report: str) -> dict[str, Any]:
    """What the page's script draws."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', report)
    assert found is not None
    return json.loads(found[1])


def test_all_charts_are_there_in_words_and_numbers(report: str, page: Page) -> None:
    panels = page.all("figure", "panel")
    titles = [(panel["aria-label"] or "").split(":")[0] for panel in panels]
    data = data_of(report)
    assert titles == [chart["title"] for chart in data["charts"]]
    for title in (
        *("Loss of SFT", "Reward", "Accuracy", "Parallel ratio", "Length", "Loss of RL", "Gradient norm"),
        *("Learning rate", "Clip share", "Entropy", "Mismatch", "Tokens per second", "Unfinished"),
    ):
        assert title in titles
    for chart in data["charts"]:
        for line in chart["lines"]:
            steps = data["xs"][line["x"]]
            assert len(steps) == len(line["y"]) >= 40 and steps == sorted(steps)
    accuracy = titles.index("Accuracy")
    assert "Accuracy: training from" in (panels[accuracy]["aria-label"] or "")
    assert len(data["charts"][accuracy]["evals"]) == 3


def test_metrics_of_a_runs_own_have_lines(tmp_path: Path) -> None:
    rows = [
        {"kind": "rl", "step": step, "reward": 1.0, "reward_accuracy": 0.5, "reward_term": "accuracy"}
        | {"reward_length": 0.5, "tokens": 90, "time_rollout_s": 0.5 * step, "time_draw_s": 0.25}
        for step in (1, 2, 0)
    ]
    rows[-1] |= {"step": 3, "time_rollout_s": 0}
    write_lines(tmp_path / "rl/metrics.jsonl", rows)
    charts = {chart.panel.title: chart.data for chart in page_charts([read_run(tmp_path)]).all}
    assert charts["Reward components"]["labels"] == ["accuracy", "length"]
    assert charts["Seconds by phase"]["labels"] == ["sampling"]
    (speed,) = charts["Tokens per second"]["lines"]
    assert speed["y"] == [180, 90, None]


def test_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a" / "tiny"), write_run(tmp_path / "b" / "tiny", seed=1)]
    (folders[1] / "config.yaml").write_text(CONFIG.replace("paths: 4", "paths: 8"))
    report = build_report(*folders, out=tmp_path / "both.html").read_text()
    page = Page(report)
    data = data_of(report)
    assert data["runs"] == ["a/tiny", "b/tiny"]
    assert {line["run"] for chart in data["charts"] for line in chart["lines"]} == {0, 1}
    assert len(page.all("tr")) == (1 + 2) + (1 + 8) + (1 + 1)
    text = " ".join("".join(page.words).split())
    assert "rollout.paths48" in text.replace(" ", "") and "rollout.max_path_tokens" not in text
    assert {trace["data-stage"] for trace in page.all("article", "trace")} == {
        f"{run}/tiny / {stage}" for run in "ab" for stage in ("rl_easy", "rl_hard")
    }


def test_ids_are_unique(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_it_loads_nothing(report: str, page: Page) -> None:
    outside = re.sub(r"<p class=\"text\">.*?</p>|<dd.*?</dd>", "", report, flags=re.DOTALL)
    assert not re.search(r"https?://|@import|fetch\(|XMLHttp|import\(", outside)
    links = [attributes[name] for _, attributes in page.tags for name in LOADS if name in attributes]
    assert links == ["data:,"]
    assert not {"iframe", "object", "embed", "img", "base"} & {tag for tag, _ in page.tags}


def test_what_a_model_or_user_wrote_stays_text(report: str, page: Page) -> None:
    assert [script.get("type") for script in page.all("script")] == ["application/json", None]
    assert "<script>document" not in report and "<img" not in report and "<b>" not in report
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    text = "".join(page.words)
    assert text.count(HOSTILE) >= 6 * 2
    assert CONFIG in text


def test_the_policy_names_the_only_script(page: Page) -> None:
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a) or ""
    assert "default-src 'none'" in policy and re.search(r"script-src 'sha256-[\w+/=]{44}'", policy)


def test_table_tiles_and_facts(page: Page) -> None:
    text = " ".join("".join(page.words).split())
    assert "arithmetic → cold_start → rl_easy → rl_hard" in text and "610 steps" in text
    assert text.index("Evaluation") < text.index("Training") < text.index("Traces")
    assert text.count("64.2 [60.0, 68.4] %") == 2 and "39.1 % after cold_start" in text
    assert len(page.all("tr")) == 1 + 4


def test_traces_are_marked_in_word_and_icon(page: Page) -> None:
    traces = page.all("article", "trace")
    assert {trace["data-stage"] for trace in traces} == {"rl_easy", "rl_hard"}
    assert {trace["data-verdict"] for trace in traces} == {"right", "wrong"}
    assert {trace["data-step"] for trace in traces if trace["data-stage"] == "rl_hard"} >= {"5", "120"}
    for verdict, icon in (("right", "✓"), ("wrong", "✗"), ("unknown", "?")):
        assert page.all("div", verdict) and icon in page.words
    for mark in ("closed by the engine", "cut off", "truncated", "not well-formed", "No summary"):
        assert any(mark in words for words in page.words), mark
    assert any("--n:6" in (paths["style"] or "") for paths in page.all("div", "paths"))


def test_the_same_run_gives_the_same_file_of_a_moderate_size(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tiny")
    first = build_report(folder).read_bytes()
    assert build_report(folder).read_bytes() == first
    assert len(first) < 5e6
    assert sorted(path.name for path in folder.glob("report*")) == ["report.html"]


def test_long_traces_stay_within_the_budget(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tiny")
    record = {"step": 1, "problem": "p", "correct": True}
    long = record | {"text_parts": [{"kind": "text", "text": "<b>&é" * (MAX_BYTES // 90)}]}
    write_lines(folder / "rl_hard" / "traces.jsonl", [long | {"step": step} for step in range(12)])
    chosen = choose_traces([read_run(folder)])
    assert 0 < sum(trace.stage == "rl_hard" for trace in chosen.shown) < 8
    assert build_report(folder).stat().st_size < 5e6


def test_what_a_run_lacks_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "early"
    write_lines(folder / "sft" / "metrics.jsonl", [{"kind": "sft", "step": 1, "loss": 3.0}])
    text = "".join(Page(build_report(folder).read_text()).words)
    for line in ("No evaluation: the run", "No traces: no stage", "No recipe: the run"):
        assert line in text
    assert "Loss of SFT" in text and "Reward" not in text
    (folder / "sft" / "metrics.jsonl").unlink()
    (folder / "config.yaml").write_text("name: early\n")
    assert "No curves: no stage" in build_report(folder).read_text()


def test_a_folder_without_a_run_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        build_report(tmp_path / "absent")
    with pytest.raises(UserError, match="no run in this folder"):
        build_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_malformed_record_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "sft" / "metrics.jsonl", [{"kind": "sft", "step": 1}, {"loss": 1.0}])
    with pytest.raises(UserError, match=r"metrics\.jsonl, record 2: no kind and no step"):
        build_report(tmp_path)


def test_stages_come_as_listed_else_by_age(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tiny", stages_json=False)
    for age, name in enumerate(("rl_hard", "cold_start", "rl_easy", "arithmetic")):
        os.utime(folder / name / "metrics.jsonl", (age, age))
    names = [stage.name for stage in read_run(folder).stages]
    assert names == ["rl_hard", "cold_start", "rl_easy", "arithmetic"]
    (folder / "stages.json").write_text(json.dumps(["not_yet_run", *list(STAGES)[:3]]))
    assert [stage.name for stage in read_run(folder).stages] == list(STAGES)
    (folder / "stages.json").write_text("{}")
    with pytest.raises(UserError, match=r"stages\.json: expected a list of stage names"):
        read_run(folder)


def test_the_mismatch_is_marked_where_rounding_ends(tmp_path: Path) -> None:
    """By dtype and depth of the run, as its steps say: not at 2e-5 in bfloat16."""
    (tmp_path / "rl").mkdir()
    record = {"kind": "rl", "step": 1, "steps": 1, "mismatch_max": 0.14, "mismatch_mean": 0.005}
    for limit in (2e-5, 0.4):
        line = json.dumps(record | {"mismatch_rounding": limit}) + "\n"
        (tmp_path / "rl/metrics.jsonl").write_text(line)
        (chart,) = page_charts([read_run(tmp_path)]).all
        assert chart.data["rounding"] == limit


def test_a_watched_run_prints_one_address_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_parallel_r1.cli", "report", "--watch"]
    folder = write_run(tmp_path / "tiny")
    with subprocess.Popen(
        [*command, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a shell ignore SIGINT, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as server:
        try:
            assert server.stdout is not None and server.stderr is not None
            line = server.stdout.readline()
            found = re.fullmatch(r"tiny: (http://127\.0\.0\.1:\d+) follows the run; Ctrl-C ends it\n", line)
            assert found is not None, line
            with urllib.request.urlopen(found[1]) as reply:
                assert b"rl_hard" in reply.read()
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) == 0
            assert server.stderr.read() == ""
        finally:
            server.kill()  # the end of the block waits for it, however long
    with pytest.raises(UserError, match="no such run folder"):
        serve_report([tmp_path / "absent"])
