"""The weights that a job's rollout servers start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_parallel_r1.cluster.job_spec import JobSpec, server_arguments
from megatron_parallel_r1.errors import UserError
from tests.curriculum.test_run import RECIPE


def test_servers_start_from_the_previous_stage(tmp_path: Path) -> None:
    spec = JobSpec.read("rl", [str(RECIPE), f"out={tmp_path}"])
    with pytest.raises(UserError, match=r"stage rl starts from .*cold_start/model, which is missing"):
        server_arguments(spec, "sglang")
    model = tmp_path / "mini/cold_start/model"
    model.mkdir(parents=True)
    (model / "config.json").touch()
    assert server_arguments(spec, "sglang") == ["--checkpoint", str(model), "--isolated"]
    keyed = JobSpec.read("rl", [str(RECIPE), f"out={tmp_path}", "rollout.key_variable=KEY"])
    assert server_arguments(keyed, "sglang")[2:] == ["--isolated", "--key-variable=KEY"]
    by_disk = ("rollout.sync.transport=disk", f"rollout.sync.folder={tmp_path}")
    on_disk = JobSpec.read("rl", [str(RECIPE), f"out={tmp_path}", "--stage", "rl", *by_disk])
    assert server_arguments(on_disk, "vllm") == ["--checkpoint", str(model)]
    replayed = JobSpec.read("rl", [str(RECIPE), f"out={tmp_path}", "thinking.mode=replay"])
    assert server_arguments(replayed, "sglang") == ["--checkpoint", str(model)]


def test_servers_need_one_run_and_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the servers load the weights of one run"):
        server_arguments(JobSpec.read("rl", [str(RECIPE), f"out={tmp_path}", "seeds=[1,2]"]), "sglang")
    alone = tmp_path / "alone.yaml"
    text = RECIPE.read_text()
    cut = text.index("  - name: cold_start")
    alone.write_text(text[:cut] + text[text.index("  - name: rl") :])
    with pytest.raises(UserError, match="stage rl starts from a fresh model"):
        server_arguments(JobSpec.read("rl", [str(alone)]), "sglang")
