"""`serve-rollout` with a real vLLM server ends with all that it started. Of SGLang's: test_losses.py."""

from __future__ import annotations

import signal

import pytest

from tests.engines.servers import Shared
from tests.unit.rollout.serving.launched import GONE_SECONDS, assert_gone

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.xdist_group("vllm")]


def test_vllm_ends_when_it_is_told_to(vllm_server: Shared) -> None:
    assert vllm_server.url
    supervisor = vllm_server.supervisor
    family = supervisor.family()
    # The guard, the server, its engine at least.
    assert len(family) >= 3
    supervisor.process.send_signal(signal.SIGTERM)
    assert supervisor.process.wait(GONE_SECONDS) == 0
    assert_gone(family)
