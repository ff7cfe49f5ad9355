"""The server's counters for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from megatron_parallel_r1.serve.response_assembler import ResponseAssembler
from megatron_parallel_r1.utils.prometheus import metric_lines

PREFIX = "parallel_r1_serve_"


class ServerMetrics:
    """Counts requests by HTTP status, and the tokens and seconds of those that were decoded."""

    def __init__(self) -> None:
        self._requests: Counter[int] = Counter()
        names = (
            "prompt_tokens",
            "response_tokens",
            "critical_path_tokens",
            "request_seconds",
            "decoded_requests",
        )
        self._totals = dict.fromkeys(names, 0.0)

    def count_request(self, status: int) -> None:
        self._requests[status] += 1

    def count_responses(
        self, prompt_tokens: int, responses: Sequence[ResponseAssembler], seconds: float
    ) -> None:
        """Counts a request that has ended, also one that was cut."""
        self._totals["prompt_tokens"] += prompt_tokens
        self._totals["response_tokens"] += sum(len(response.tokens) for response in responses)
        self._totals["critical_path_tokens"] += sum(response.critical_tokens for response in responses)
        self._totals["request_seconds"] += seconds
        self._totals["decoded_requests"] += 1

    def text(self, gauges: Mapping[str, float]) -> str:
        """All counters, and gauges of this moment by name."""
        requests = [({"status": str(status)}, count) for status, count in sorted(self._requests.items())]
        lines = [*metric_lines(f"{PREFIX}requests_total", "counter", requests)]
        for name, total in self._totals.items():
            lines += metric_lines(f"{PREFIX}{name}_total", "counter", [({}, total)])
        for name, value in gauges.items():
            lines += metric_lines(f"{PREFIX}{name}", "gauge", [({}, value)])
        return "".join(lines)
