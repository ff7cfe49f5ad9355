"""What rollouts cost one process of an engine, from shapes alone.

Each pass draws a token for every row under way. It reads all weights once and each row's cache (arXiv
2211.05102, section 2): with few rows memory's bandwidth bounds it, with many the products do.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.planning.cost import Cost, sent
from megatron_parallel_r1.planning.lengths import PATH_TAGS, longest_branches, longest_response
from megatron_parallel_r1.planning.memory import FLOAT32
from megatron_parallel_r1.planning.training import Split, forward_cost, layer_weights
from megatron_parallel_r1.rollout.settings import Thinking


@dataclass(frozen=True, slots=True)
class Draws:
    """What one copy of an engine is asked for.

    Attributes:
        prompts: different ones, each read once.
        prompt: tokens of one.
        traces: in all.
        concurrent: of them under way at once.
    """

    prompts: float
    prompt: int
    traces: float
    concurrent: int


def width(thinking: Thinking) -> float:
    """Rows that a trace decodes at once, on average, if it is as long as its limits let it be."""
    if thinking.mode == "sequential" or thinking.max_blocks == 0:
        return 1.0
    response = longest_response(thinking)
    inside = min(response, thinking.max_blocks * thinking.paths * (thinking.max_path_tokens + PATH_TAGS))
    return response / (response - inside + inside / thinking.paths)


def rollout_cost(split: Split, thinking: Thinking, draws: Draws) -> Cost:
    """Of all traces of one copy, each as long as it may be; of one of the processes that share the copy.

    Only a `split` over tensor ranks is meant: engines have all layers in each process.
    """
    response = longest_response(thinking)
    rows = min(draws.concurrent, max(1.0, draws.traces)) * width(thinking)
    passes = draws.traces * response / rows
    context = draws.prompt + response / 2
    drawn = passes * pass_cost(split, rows, context)
    # Prompts, and in `replay` the paths that each summary reads in its flat text.
    read = draws.prompts * draws.prompt
    joined = draws.traces * longest_branches(thinking)
    reading = forward_cost(split, read, draws.prompt / 2) if read else Cost()
    joining = forward_cost(split, joined, context) if joined else Cost()
    return drawn + reading + joining


def pass_cost(split: Split, rows: float, context: float) -> Cost:
    """Of one token for each of `rows`, with so many tokens of cache behind each."""
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
    """Weights of the experts that some row goes through: all, if rows choose them evenly and are many."""
    if shape.experts is None:
        return 0.0
    left_out = (1 - shape.experts.per_token / shape.experts.count) ** rows
    return shape.experts.count * (1 - left_out) * 3 * shape.hidden * shape.experts.ffn
