"""Upper bounds of response lengths, and the cost of rollouts for one rank of an engine.

Each pass samples a token for every active row. It reads all weights once and each row's cache (arXiv
2211.05102, section 2): with few rows memory bandwidth is the bound, with many the matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.planning.machine import Cost, sent
from megatron_parallel_r1.planning.memory import FLOAT32
from megatron_parallel_r1.planning.training import Split, forward_cost, layer_weights
from megatron_parallel_r1.rollout.settings import Thinking

# Beside a path's sampled tokens: `<Path>`, and the `</Path>` that is forced at a limit.
PATH_TAGS = 2


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """Tokens of a prompt and of a whole SFT row at most, where the recipe does not bound them.

    The defaults are Parallel-R1's limits on its data (arXiv 2509.07980).
    """

    prompt: int = 2000
    example: int = 4096


def longest_response(thinking: Thinking) -> int:
    """Returns the most tokens of a flat response; all paths of a block may fill one critical path."""
    together = 1 if thinking.mode == "sequential" else thinking.most_paths**thinking.max_depth
    critical = thinking.max_critical_tokens or thinking.max_response_tokens
    return min(thinking.max_response_tokens, critical * together)


def longest_branches(thinking: Thinking) -> int:
    """Returns the most tokens that `replay` repeats: paths 2..N of each block, once per nesting level."""
    if thinking.mode != "replay" or thinking.most_paths == 1 or thinking.max_blocks == 0:
        return 0
    response = longest_response(thinking)
    if thinking.max_depth > 1:
        return thinking.max_depth * response
    repeated = thinking.max_blocks * (thinking.most_paths - 1) * (thinking.max_path_tokens + PATH_TAGS)
    return min(response, repeated)


def longest_row(thinking: Thinking, prompt: int) -> int:
    """Returns the most tokens of a trace's row after a prompt of `prompt` tokens.

    The engine's cache holds no more: in `replay` a block is joined by writing paths 2..N again.
    """
    return prompt + longest_response(thinking) + longest_branches(thinking)


@dataclass(frozen=True, slots=True)
class RolloutLoad:
    """The rollouts of one engine replica: distinct prompts, each prefilled once, and tokens of one; traces in
    total and at once."""

    prompts: float
    prompt: int
    traces: float
    concurrent: int


def width(thinking: Thinking) -> float:
    """Returns the average number of rows that a trace of maximum length decodes at once."""
    if thinking.mode == "sequential" or thinking.max_blocks == 0:
        return 1.0
    response = longest_response(thinking)
    inside = min(response, thinking.max_blocks * thinking.most_paths * (thinking.max_path_tokens + PATH_TAGS))
    return response / (response - inside + inside / thinking.most_paths)


def rollout_cost(split: Split, thinking: Thinking, load: RolloutLoad) -> Cost:
    """Returns the cost of all traces of one replica at maximum length, for one of its ranks.

    `split` is over tensor ranks only: an engine's rank has all layers.
    """
    response = longest_response(thinking)
    rows = min(load.concurrent, max(1.0, load.traces)) * width(thinking)
    passes = load.traces * response / rows
    context = load.prompt + response / 2
    drawn = passes * pass_cost(split, rows, context)
    # Prompts, and in `replay` the paths that are prefilled again before each summary.
    read = load.prompts * load.prompt
    joined = load.traces * longest_branches(thinking)
    reading = forward_cost(split, read, load.prompt / 2) if read else Cost()
    joining = forward_cost(split, joined, context) if joined else Cost()
    return drawn + reading + joining


def pass_cost(split: Split, rows: float, context: float) -> Cost:
    """Returns the cost of one token for each of `rows`, with `context` cached tokens each."""
    shape, size, number = split.shape, split.parallel.tensor, split.number
    query, key = shape.heads * shape.head_dim / size, shape.kv_heads * shape.head_dim / size
    attention, mlp, chosen = layer_weights(shape)
    summed = 2 * 2 * (size - 1) / size * rows * shape.hidden * number
    layer = Cost(
        products=2 * rows * (attention + mlp) / size,
        experts=2 * rows * chosen / size,
        attention=4 * rows * context * query,
        stream=number * ((attention + mlp + _experts_read(shape, rows)) / size + rows * context * 2 * key),
        passes=1,
    ) + sent(summed, size, split.per_node)
    vocab = shape.vocab / size
    head = Cost(
        products=2 * rows * shape.hidden * vocab,
        stream=number * shape.hidden * vocab + 3 * FLOAT32 * rows * vocab,
    )
    return shape.layers * layer + head


def _experts_read(shape: ModelConfig, rows: float) -> float:
    """Returns the weights of the experts that any row is routed to, for evenly routed rows."""
    if shape.experts is None:
        return 0.0
    left_out = (1 - shape.experts.per_token / shape.experts.count) ** rows
    return shape.experts.count * (1 - left_out) * 3 * shape.hidden * shape.experts.ffn
