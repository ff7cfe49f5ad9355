"""The report in a real browser: its script runs, foreign ones do not, filters and read-off work."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_parallel_r1.report.html import build_report
from tests.unit.report.synthetic import write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking "
    "--disable-component-update --disable-sync --no-first-run --window-size=1400,2400"
)
USE_FILTERS = """<script>
const form = document.querySelector(".filters");
const choose = (name, value) => { form[name].value = value; form[name].dispatchEvent(new Event("change")); };
const seen = () => {
  const chosen = [...document.querySelectorAll(".trace")].filter((t) => t.getClientRects().length);
  return chosen.map((t) => [t.dataset.stage, t.dataset.step, t.dataset.verdict].join(" ")).join(";")
    + "|" + form.querySelector("output").textContent;
};
const log = [seen()];
choose("stage", "rl_easy"); log.push(seen());
choose("verdict", "wrong"); log.push(seen());
choose("step", "5"); log.push(seen());
form.next.click(); form.previous.click(); log.push(seen());
const panel = document.querySelectorAll(".panel")[2];
const box = panel.querySelector("svg").getBoundingClientRect();
const move = { clientX: box.right - 12, clientY: box.top + box.height / 2 };
panel.dispatchEvent(new PointerEvent("pointermove", move));
log.push(panel.querySelector(".reading-off").textContent);
const wide = [...document.querySelectorAll(".paths")].find((p) => p.style.getPropertyValue("--n") === "6");
wide.closest(".trace").classList.add("chosen");
log.push(wide.scrollWidth > wide.clientWidth, document.body.scrollWidth <= innerWidth);
document.title = log.join("\\n");
</script>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(write_run(tmp_path_factory.mktemp("runs") / "tiny"))


def _dom(url: str, folder: Path) -> str:
    """The page's HTML after its scripts ran; any request to a network fails."""
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder}", "--dump-dom", url]
    command.insert(-2, "--host-resolver-rules=MAP * ~NOTFOUND")
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def test_one_trace_is_open_and_no_foreign_script_ran(report: Path, tmp_path: Path) -> None:
    dom = _dom(f"{report.as_uri()}#trace-3", tmp_path)
    assert re.search(r'<html[^>]* class="js"', dom), "the page's own script did not run"
    assert re.findall(r'<article class="trace \w+ chosen" id="(trace-\d+)"', dom) == ["trace-3"]
    assert "<title>tiny · parallel thinking report</title>" in dom


def test_filters_turning_and_reading_off(report: Path, tmp_path: Path) -> None:
    """A copy without the content policy lets the test press the buttons."""
    page = re.sub(r"<meta http-equiv.*?>", "", report.read_text())
    copy = report.with_name("copy.html")
    copy.write_text(page.replace("</body>", USE_FILTERS + "</body>"))
    title = re.search(r"<title>(.*?)</title>", _dom(copy.as_uri(), tmp_path), re.DOTALL)
    assert title is not None
    start, stage, wrong, step, turned, read_off, wide, fits = title.group(1).split("\n")
    assert start.startswith("rl_hard 120 right|") and stage.startswith("rl_easy 40 right|")
    assert wrong.startswith("rl_easy 40 wrong|") and step.startswith("rl_easy 5 wrong|")
    assert turned == step
    assert re.fullmatch(r"(rl_hard, step|held-out after rl_hard, step) \d+: \d+\.\d %", read_off)
    assert (wide, fits) == ("true", "true")
