"""With which weights the rollout servers of a job begin."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_parallel_r1.cluster.job_spec import Order
from megatron_parallel_r1.cluster.servers import server_words
from megatron_parallel_r1.errors import UserError
from tests.curriculum.test_run import RECIPE


def test_servers_begin_with_the_stage_before(tmp_path: Path) -> None:
    order = Order.read("rl", [str(RECIPE), f"out={tmp_path}"])
    with pytest.raises(UserError, match=r"stage rl starts from .*cold_start/model, which is not there"):
        server_words(order, "sglang")
    model = tmp_path / "mini/cold_start/model"
    model.mkdir(parents=True)
    (model / "config.json").touch()
    assert server_words(order, "sglang") == ["--checkpoint", str(model), "--isolated"]
    by_disk = ("rollout.sync.transport=disk", f"rollout.sync.folder={tmp_path}")
    on_disk = Order.read("rl", [str(RECIPE), f"out={tmp_path}", "--stage", "rl", *by_disk])
    assert server_words(on_disk, "vllm") == ["--checkpoint", str(model)]
    replayed = Order.read("rl", [str(RECIPE), f"out={tmp_path}", "thinking.mode=replay"])
    assert server_words(replayed, "sglang") == ["--checkpoint", str(model)]


def test_servers_need_one_run_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the servers begin with the weights of one run"):
        server_words(Order.read("rl", [str(RECIPE), f"out={tmp_path}", "seeds=[1,2]"]), "sglang")
    alone = tmp_path / "alone.yaml"
    text = RECIPE.read_text()
    cut = text.index("  - name: cold_start")
    alone.write_text(text[:cut] + text[text.index("  - name: rl") :])
    with pytest.raises(UserError, match="stage rl begins with a fresh model"):
        server_words(Order.read("rl", [str(alone)]), "sglang")
