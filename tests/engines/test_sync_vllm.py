"""Weights published to a real vLLM server over a disk, and the tied output matrix that it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.gpt import Model, build_model
from megatron_parallel_r1.rollout.servers.pool import ServerPool
from megatron_parallel_r1.rollout.servers.vllm import VllmClient
from megatron_parallel_r1.sync.publisher import Publisher
from megatron_parallel_r1.sync.settings import InFlightPolicy, Sync
from megatron_parallel_r1.sync.vllm import VllmControl
from megatron_parallel_r1.train.logprob_runner import LogprobRunner, causal_logprobs
from tests.engines.servers import vllm
from tests.engines.trained import EXACT, ROWS, SHAPE, Trained, draw, write_drawn
from tests.engines.under_way import LONG, Asked

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.xdist_group("sync_vllm")]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    torch.set_num_threads(1)
    with process.running(seed=1):
        yield build_model(SHAPE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the tied model. Each test publishes its own weights.

    Its log-probs leave the temperature out, so that the client's refusal needs no server of its own; weights
    and their probe, at temperature 1, do not hang on that.
    """
    folder = write_drawn(tmp_path_factory.mktemp("sync") / "tied", SHAPE, seed=100)
    with vllm(folder, "--logprobs-mode", "raw_logprobs") as url:
        yield url


def test_a_server_with_raw_log_probs_is_refused_for_rollouts(server: str) -> None:
    with pytest.raises(UserError, match="leave the temperature out; start vLLM"):
        ServerPool(VllmClient, [server]).wait_ready()


class Plain(VllmControl):
    """As if vLLM took what a tied model's folder has."""

    wants_head = False


def publisher_to(
    control: VllmControl, model: Model, folder: Path, in_flight: InFlightPolicy = "finish"
) -> Publisher:
    settings = Sync(
        transport="disk",
        bucket_bytes=30_000,
        in_flight=in_flight,
        tolerance=EXACT,
        timeout_s=120,
        folder=folder,
    )
    return Publisher([control], model, settings, ROWS, Trained(model))


def test_two_updates_of_tied_weights_are_exact(server: str, model: Model, tmp_path: Path) -> None:
    control = VllmControl(server, 120)
    publisher = publisher_to(control, model, tmp_path)
    for version in (11, 12):
        draw(model, version)
        published = publisher.publish(version)
        print(f"vLLM, disk, tied: {published.difference:.1e}")
        assert published.difference <= EXACT and control.info().version == version
    publisher.end()


def test_the_old_output_matrix_is_an_error_that_names_it(server: str, model: Model, tmp_path: Path) -> None:
    whole = publisher_to(VllmControl(server, 120), model, tmp_path)
    draw(model, 21)
    whole.publish(21)
    publisher = publisher_to(Plain(server, 120), model, tmp_path)
    # As it stands after a publication that was right.
    publisher._old_head, publisher._before = whole._old_head, whole._before
    draw(model, 22)
    with pytest.raises(UserError, match=rf"{server}: after the sync to version 22 .* kept the old one"):
        publisher.publish(22)
    draw(model, 23)
    assert whole.publish(23).difference <= EXACT


class AskedControl(Asked, VllmControl):
    def question(self) -> tuple[str, dict]:
        body = {"model": self._name(), "prompt": [5, 6, 7], "max_tokens": LONG, "temperature": 0}
        return "/v1/completions", body | {"ignore_eos": True, "logprobs": 0, "return_token_ids": True}


@pytest.mark.parametrize("in_flight", ["finish", "retract", "abort"])
def test_what_becomes_of_requests_under_way(
    server: str, model: Model, tmp_path: Path, in_flight: InFlightPolicy
) -> None:
    # On a busy machine a request may be over before the pause comes; then another one is asked.
    for old in (31, 33, 35, 37, 39):
        before = publisher_to(VllmControl(server, 120), model, tmp_path)
        draw(model, old)
        before.publish(old)
        control = AskedControl(server)
        publisher = publisher_to(control, model, tmp_path, in_flight)
        draw(model, old + 1)
        assert publisher.publish(old + 1).up_to_date == (server,)
        control.request.join(300)
        choices = [answer["choices"][0] for answer in control.answers]
        reason = choices[-1]["finish_reason"]
        tokens = [token for choice in choices for token in choice["token_ids"]]
        logprobs = [
            value for choice in choices for value in (choice["logprobs"] or {}).get("token_logprobs", ())
        ]
        print(in_flight, reason, len(tokens))
        if reason == "abort":
            break
        assert reason == "length" and len(tokens) == len(logprobs) == LONG
        # The last token was drawn, and its past computed, under one of the two.
        expected = {version: last_logprob(model, tokens, version) for version in (old, old + 1)}
        apart = {version: abs(logprobs[-1] - value) for version, value in expected.items()}
        if in_flight == "finish" or apart[old + 1] <= EXACT:
            break
    if in_flight == "abort":
        assert reason == "abort" and len(tokens) < LONG
    elif in_flight == "retract":
        assert apart[old + 1] <= EXACT < apart[old]
    else:
        assert apart[old] <= EXACT < apart[old + 1]


def last_logprob(model: Model, tokens: list[int], version: int) -> float:
    draw(model, version)
    scorer = LogprobRunner(model)
    (scores,) = causal_logprobs(scorer, [(5, 6, 7, *tokens)], capacity=LONG + 8)
    return scores[-1]


def test_another_transport_is_refused(server: str, model: Model) -> None:
    publisher = Publisher([VllmControl(server)], model, Sync(), ROWS, Trained(model))
    with pytest.raises(
        UserError, match=r"takes no weights by sync.transport distributed; set it to one of disk"
    ):
        publisher.publish(1)
