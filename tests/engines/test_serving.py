"""`serve-rollout` with real servers: what is killed comes back or leaves nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from tests.engines.servers import START_SECONDS, python_of
from tests.unit.rollout.serving.launched import GONE_SECONDS, assert_gone, launched

pytestmark = [pytest.mark.engines, pytest.mark.slow]
PROMPT = [9, 10, 11]


def test_sglang_draws_by_seed_and_ends_with_a_killed_supervisor(tiny_folder: Path, tmp_path: Path) -> None:
    settings = {"context_tokens": 1024, "device": "cpu", "port": 0, "log_dir": tmp_path}
    with launched(checkpoint=tiny_folder, python=python_of("sglang"), **settings) as it:
        _, url, _ = it.next_healthy(START_SECONDS)

        def drawn(*seeds: int) -> list[list[int]]:
            told = [{"max_new_tokens": 24, "sampling_seed": seed, "ignore_eos": True} for seed in seeds]
            asked = {"input_ids": [PROMPT] * len(seeds), "sampling_params": told}
            answers = httpx.post(f"{url}/generate", json=asked, timeout=START_SECONDS).json()
            return [answer["output_ids"] for answer in answers]

        first, second = drawn(1, 2)
        assert first != second
        # Among others, in another place.
        assert drawn(5, 2, 1, 2)[1:] == [second, first, second]
        family = it.family()
        # The guard, the server, its scheduler and its detokenizer at least.
        assert len(family) >= 4
        it.process.kill()
        assert_gone(family)


def test_vllm_comes_back_and_ends_when_told_to(tiny_folder: Path, tmp_path: Path) -> None:
    settings = {"engine": "vllm", "context_tokens": 1024, "device": "cpu", "port": 0, "log_dir": tmp_path}
    with launched(checkpoint=tiny_folder, python=python_of("vllm"), **settings) as it:
        index, url, pid = it.next_healthy(START_SECONDS)
        old = psutil.Process(pid).children(recursive=True)
        assert old
        os.kill(pid, signal.SIGKILL)
        assert it.next_healthy(START_SECONDS)[:2] == (index, url)
        assert_gone(old)
        asked = {"model": str(tiny_folder), "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=START_SECONDS).json()
        assert answer["usage"]["completion_tokens"] == 4
        family = it.family()
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(GONE_SECONDS) == 0
        assert_gone(family)
