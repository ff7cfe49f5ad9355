"""A trainer and a real SGLang server that take turns with memory: the order of calls, exactness, and a server
lost in its sleep. The other points of a hand-over: tests/curriculum/test_colocated.py."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_parallel_r1.curriculum.run import run
from megatron_parallel_r1.sync.control import HttpClient
from megatron_parallel_r1.train.offload import TrainerMemory
from tests.curriculum.test_run_folder import recipe_with
from tests.engines.servers import python_of

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.xdist_group("rl")]

EXACT = 2e-5
ROLLOUT = "rollout={engine: sglang, servers: 1, colocated: true, patience_s: 1200, sync: {transport: tensor}}"
PAUSE = ["begin_weight_update", "pause_generation", "end_weight_update"]
UPDATE = ["begin_weight_update", "update_weights_from_tensor", "end_weight_update"]
PROBE = ["continue_generation", "generate"]
SLEEP = [*PAUSE, "release_memory_occupation", "onload"]
RESUME_WEIGHTS = "resume_memory_occupation weights"
RESUME_CACHE = "resume_memory_occupation kv_cache cuda_graph"


class Recorder:
    """What trainer and server did, in order, and the bytes of the trainer's gradients at each point."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.gradients: list[int] = []
        self.resident: list[tuple[int, int]] = []
        self._memory: TrainerMemory | None = None
        for name in ("offload", "onload"):
            patch.setattr(TrainerMemory, name, self._noted(getattr(TrainerMemory, name), name))
        real = HttpClient.post

        def post(
            client: HttpClient, path: str, body: Mapping[str, Any] | None = None, quick: bool = False
        ) -> Any:
            answer = real(client, path, body, quick)
            self._note(" ".join([path.strip("/"), *(body or {}).get("tags", ())]))
            return answer

        patch.setattr(HttpClient, "post", post)

    def _noted(self, real: Any, name: str) -> Any:
        def call(memory: TrainerMemory) -> None:
            acts = memory._is_offloaded == (name == "onload")
            real(memory)
            self._memory = memory
            if acts:
                self._note(name)

        return call

    def _note(self, call: str) -> None:
        self.calls.append(call)
        buffers = [b for stage in self._memory._wrapped for b in stage.buffers] if self._memory else []
        self.gradients.append(sum(b.grad_data.untyped_storage().nbytes() for b in buffers))
        own = psutil.Process()
        self.resident.append((resident(own), sum(map(resident, own.children(recursive=True)))))
        if call == "onload" and self.calls.count(call) == 2:
            kill_server()


def resident(process: psutil.Process) -> int:
    """Bytes; 0 of one that has just ended, as those of the test before may."""
    with suppress(psutil.NoSuchProcess):
        return process.memory_info().rss
    return 0


def kill_server() -> None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            if "sglang.launch_server" in words and "guard" not in " ".join(words):
                process.kill()


def test_a_server_that_shares_and_is_lost_in_its_sleep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python_of("sglang")
    recorder = Recorder(monkeypatch)
    words = ("thinking.mode=replay", ROLLOUT, "stages.cold_start.steps=2", "stages.rl.steps=3")
    folder = run(recipe_with(tmp_path, *words))[0].folder
    awake = ["offload", *PAUSE, *UPDATE, *PROBE, *SLEEP]
    woken = ["offload", RESUME_WEIGHTS, *PAUSE, *UPDATE, RESUME_CACHE, *PROBE, *SLEEP]
    # The third server call is to a process that started anew, with all of its memory.
    assert [call for call, _ in groupby(recorder.calls)] == [*awake, *woken, *awake, "offload"]
    steps = [json.loads(line) for line in (folder / "rl/metrics.jsonl").read_text().splitlines()]
    for step in steps:
        assert step["mismatch_max"] <= EXACT and step["sync_difference"] <= EXACT and step["servers_up"] == 1
    full = recorder.gradients[recorder.calls.index("onload")]
    held = [held for call, held in zip(recorder.calls, recorder.gradients, strict=True) if call != "onload"]
    assert full > 0 and not any(held)
    for call, (trainer, servers) in zip(recorder.calls, recorder.resident, strict=True):
        print(f"{call}: trainer {trainer / 1e6:.0f} MB resident, server {servers / 1e6:.0f} MB")
    # The server's own log: all were answered, the later ones by the second process.
    log = (folder / "servers/server-0.log").read_text()
    answers = re.findall(r'"POST /(\w+_memory_occupation) HTTP/1.1" (\d+)', log)
    released = ("release_memory_occupation", "200")
    assert answers == [released, *[("resume_memory_occupation", "200")] * 2, released, released]
