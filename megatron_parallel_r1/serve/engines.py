"""The engine behind the server: native, or rollout servers, given by address or started for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_parallel_r1.errors import UserError

if TYPE_CHECKING:
    from megatron_parallel_r1.rollout.engine import Engine
    from megatron_parallel_r1.rollout.settings import Thinking
    from megatron_parallel_r1.serve.served_model import ServedModel

ServingEngine = Literal["native", "sglang", "vllm"]


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine of `parallel-r1 serve`.

    Attributes:
        urls: base addresses of running servers.
        servers: number of servers to start instead; they end with this process.
        key_variable, key_file: where the API key of the servers is.
        log_dir: folder of the logs of started servers.
    """

    name: ServingEngine = "native"
    urls: tuple[str, ...] = ()
    servers: int = 0
    key_variable: str | None = None
    key_file: Path | None = None
    log_dir: Path = Path("runs/servers")

    def check(self, device: str | None) -> None:
        """Raises:
        UserError: its parts do not go together.
        """
        if self.name == "native":
            if self.urls or self.servers:
                raise UserError(
                    "serve: --server and --servers are of other engines; give --engine sglang or vllm"
                )
        elif device is not None:
            raise UserError("serve: --device is of the native engine; leave it out")
        elif bool(self.urls) == bool(self.servers):
            raise UserError(
                f"serve: engine {self.name} needs --server URL of each server, or --servers N to start them"
            )


@contextmanager
def opened_model(
    folder: Path, name: str | None, device: str | None, choice: EngineChoice
) -> Iterator[ServedModel]:
    """The model of a released folder on the chosen engine.

    Raises:
        UserError: the folder cannot be served, or the servers cannot be used.
    """
    choice.check(device)
    from megatron_parallel_r1.config.rollout import Rollout
    from megatron_parallel_r1.evaluation.engines import EngineSpec, engine_opener
    from megatron_parallel_r1.run.own_servers import OwnServers
    from megatron_parallel_r1.serve.served_model import ServedModel

    if choice.name == "native":
        yield ServedModel.load(folder, name, device)
        return
    with ExitStack() as stack:

        def connect(thinking: Thinking) -> Engine[Any]:
            keys: dict[str, Any] = {"key_variable": choice.key_variable, "key_file": choice.key_file}
            urls = choice.urls
            if not urls:
                rollout = Rollout(engine=choice.name, servers=choice.servers, **keys)
                own = stack.enter_context(OwnServers(rollout, choice.log_dir, _report, ranks=0))
                urls = own.urls(folder, isolated=thinking.mode == "isolated")
            spec = EngineSpec(folder, servers=urls, **keys)
            return stack.enter_context(engine_opener(choice.name)(spec)).engine

        yield ServedModel.load(folder, name, engine_name=choice.name, connect=connect)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
