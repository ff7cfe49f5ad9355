"""What one client may ask of the server, and all of them together."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_parallel_r1.errors import UserError


@dataclass(frozen=True, slots=True)
class Limits:
    """Each at least 1.

    Attributes:
        body_bytes: of a request.
        body_seconds: for a request's body to arrive.
        prompt_tokens: of one prompt, its template included.
        max_tokens: of one response, forced ones included; None: as many as the model was trained with.
        choices: responses to one request: its prompts times its n.
        running: requests that are decoded at once.
        cache_tokens: that those at once may come to hold in the engine's cache; None: as many as they need.
        waiting: requests that wait for their turn; a further one is sent away.
        seconds: from a request's arrival to the end of its answer, waiting included.
    """

    body_bytes: int = 2**18
    body_seconds: float = 10.0
    prompt_tokens: int = 4096
    max_tokens: int | None = None
    choices: int = 16
    running: int = 8
    cache_tokens: int | None = None
    waiting: int = 64
    seconds: float = 600.0

    def __post_init__(self) -> None:
        broken = [name for name, value in asdict(self).items() if value is not None and not value >= 1]
        if broken:
            raise UserError(f"serve: {', '.join(broken)} must be at least 1")
