"""What a recipe can say of rollout servers, and what it is told when that cannot work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.ports import free_port
from megatron_parallel_r1.run.folder import is_resumable, open_run_folder
from tests.curriculum.test_bad_input import RECIPE, fail
from tests.unit.rollout.scripted_server import scripted_server
from tests.unit.rollout.test_sglang import FakeSGLang


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("rollout.servers=1",), "the native engine needs no servers"),
        (("rollout.engine=sglang",), "needs servers: give urls, urls_file, or servers"),
        (
            ("rollout.engine=sglang", "rollout.servers=1", "rollout.urls_file=urls"),
            "needs servers: give urls, urls_file, or servers",
        ),
        (
            ("rollout.engine=sglang", "rollout.urls_file=urls", "rollout.colocated=true"),
            "colocated: only for servers that the run starts",
        ),
        (
            (
                *("rollout.engine=sglang", "rollout.servers=1", "rollout.colocated=true"),
                "stages.rl.max_off_policy_steps=1",
            ),
            "stage rl: max_off_policy_steps draws while the trainer learns, but colocated servers sleep then",
        ),
        (
            ("rollout.engine=sglang", "rollout.servers=1", "rollout.compiled=true"),
            "compiled: only the native engine's layers; sglang has its own",
        ),
        (("rollout.engine=vllm", "rollout.servers=1"), "vllm takes new weights from disk only"),
        (("rollout.engine=sglang", "rollout.servers=1", "rollout.sync.transport=disk"), "needs a folder"),
        (
            ("rollout.engine=sglang", "rollout.servers=1", "rollout.sync.tolerance=0"),
            "rollout.sync.tolerance",
        ),
        (("rollout.engine=sglang", "rollout.servers=1", "rollout.sync.speed=9"), "speed"),
        (("rollout.engine=sglang", "rollout.urls=[nowhere]"), "rollout.urls.0"),
    ],
)
def test_settings_that_cannot_work(capsys, monkeypatch, tmp_path: Path, words, named: str) -> None:
    assert named in fail(capsys, monkeypatch, "curriculum", RECIPE, f"out={tmp_path}", *words)
    assert not list(tmp_path.iterdir())


def test_no_server_answers(capsys, monkeypatch, tmp_path: Path) -> None:
    """The run ends by itself after the patience that is set; what was trained before stays."""
    url = f"http://127.0.0.1:{free_port()}"
    words = [f"out={tmp_path}", "thinking.mode=replay", "stages.cold_start.steps=2"]
    words += ["rollout.engine=sglang", f"rollout.urls=[{url}]", "rollout.patience_s=1"]
    shown = fail(capsys, monkeypatch, "curriculum", RECIPE, *words)
    assert re.search(rf"no rollout server usable for \d+ s: {url}", shown)
    assert "the run resumes from its last checkpoint" in shown
    assert len(list(tmp_path.glob("*/cold_start/model/config.json"))) == 1


def test_servers_of_several_copies_are_refused_when_the_run_meets_them(
    capsys, monkeypatch, tmp_path: Path
) -> None:
    server = FakeSGLang()
    server.server_info["dp_size"] = 2
    words = [f"out={tmp_path}", "thinking.mode=replay", "stages.cold_start.steps=2"]
    words += ["rollout.engine=sglang", "rollout.patience_s=1"]
    with scripted_server(server) as url:
        shown = fail(capsys, monkeypatch, "curriculum", RECIPE, *words, f"rollout.urls=[{url}]")
    assert f"{url} has 2 copies of the model" in shown and "start more servers instead of --dp" in shown


def test_who_decodes_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    there = read_recipe(Path(RECIPE), ["rollout.engine=sglang", "rollout.urls=[http://a:1,http://b:2]"])
    open_run_folder(there, tmp_path / "run", resume=False)
    (tmp_path / "run" / "cold_start" / "model").mkdir(parents=True)
    for words in (["rollout.engine=sglang", "rollout.servers=2"], []):
        assert is_resumable(read_recipe(Path(RECIPE), words), tmp_path / "run", fresh=False)
    with pytest.raises(UserError, match="started with another recipe"):
        is_resumable(read_recipe(Path(RECIPE), ["seed=77"]), tmp_path / "run", fresh=False)
