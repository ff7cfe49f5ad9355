"""Every format through real servers: log-probs are those of `transformers`, and plans say how many paths."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from megatron_parallel_r1.rollout.servers.client import Server
from megatron_parallel_r1.rollout.servers.engine import ServerEngine
from megatron_parallel_r1.rollout.servers.pool import ServerPool
from megatron_parallel_r1.rollout.servers.sglang import SglangClient
from megatron_parallel_r1.rollout.servers.vllm import VllmClient
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.layout import Mode
from megatron_parallel_r1.thought.trace import Trace
from tests.engines.folders import tied_model, write_folder
from tests.engines.isolated import HTTP_SECONDS, STRICT
from tests.engines.servers import Shared
from tests.reference.formats import ALL, tags_of
from tests.unit.rollout.test_exactness import TOLERANCE, largest_difference
from tests.unit.rollout.tiny import eager_of, random_prompts, tiny_qwen3

pytestmark = [pytest.mark.engines, pytest.mark.slow]
TAGS = {name: tags_of(format) for name, format in ALL.items() if name != "parallel_r1"}


def thought(url: str, client: type[Server], name: str, mode: Mode) -> list[Trace]:
    """Traces of a format, blocks inside paths included, with the paths that their plans ask for."""
    pool = ServerPool(client, (url,))
    pool.wait_ready()
    thinking = Thinking(mode=mode, paths=3, max_depth=2, max_path_tokens=90, max_response_tokens=400)
    thinker = Thinker(ServerEngine(pool), TAGS[name], thinking)
    traces = asyncio.run(roll_out(thinker, random_prompts(16), list(range(16))))
    blocks = [block for trace in traces for _, block in trace.tree.all_blocks()]
    assert len(blocks) >= 5 and all(len(block.paths) == (block.planned or 3) for block in blocks)
    if ALL[name].plan is not None:
        assert len({len(block.paths) for block in blocks}) > 1
    return traces


@pytest.fixture(scope="module")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, Path]]]:
    """A server with the plugin, and the folder of a model for each format."""
    folder = tmp_path_factory.mktemp("formats")
    folders = {
        name: write_folder(folder / name, tiny_qwen3(eager=eager_of(tags))) for name, tags in TAGS.items()
    }
    server = Shared(folders["npr"], folder / "logs", isolated=True, env=STRICT)
    yield server.url, folders
    server.end()


@pytest.mark.xdist_group("sglang formats")
@pytest.mark.parametrize("mode", ["isolated", "replay"])
@pytest.mark.parametrize("name", sorted(TAGS))
def test_sglang(sglang: tuple[str, dict[str, Path]], name: str, mode: Mode) -> None:
    url, folders = sglang
    body = {"model_path": str(folders[name]), "flush_cache": True}
    httpx.post(f"{url}/update_weights_from_disk", json=body, timeout=HTTP_SECONDS).raise_for_status()
    traces = thought(url, SglangClient, name, mode)
    worst = largest_difference(tiny_qwen3(eager=eager_of(TAGS[name])), traces, mode)
    print(f"sglang, {name}, {mode}: {worst:.2g}")
    assert worst <= TOLERANCE


@pytest.mark.xdist_group("vllm formats")
def test_vllm(tmp_path: Path) -> None:
    """In the format with most forced text: before and behind a path's tag, and around the summary's."""
    model = tied_model(eager=eager_of(TAGS["npr"]))
    server = Shared(write_folder(tmp_path / "model", model), tmp_path / "logs", "vllm")
    try:
        worst = largest_difference(model, thought(server.url, VllmClient, "npr", "replay"), "replay")
    finally:
        server.end()
    print(f"vllm, npr, replay: {worst:.2g}")
    assert worst <= TOLERANCE
