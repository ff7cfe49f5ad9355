"""How long rows can get, from the limits that a recipe sets."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.planning.machine import Cost, sent
from megatron_parallel_r1.planning.memory import FLOAT32
from megatron_parallel_r1.planning.training import Split, forward_cost, layer_weights
from megatron_parallel_r1.rollout.settings import Thinking

# Around what a path draws: `<Path>`, and the `</Path>` that is forced where a limit cut it.
PATH_TAGS = 2


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """Where a recipe does not bound them: tokens of a prompt, and of an SFT row with all that belongs to it.

    The defaults are what Parallel-R1 keeps of its data (arXiv 2509.07980).
    """

    prompt: int = 2000
    example: int = 4096


def longest_response(thinking: Thinking) -> int:
    """Tokens of a flat response at most; all paths of a block may fill one critical path."""
    together = 1 if thinking.mode == "sequential" else thinking.paths**thinking.max_depth
    critical = thinking.max_critical_tokens or thinking.max_response_tokens
    return min(thinking.max_response_tokens, critical * together)


def longest_branches(thinking: Thinking) -> int:
    """Tokens that `replay` repeats behind a response: paths 2..N of each block, once a level of nesting."""
    if thinking.mode != "replay" or thinking.paths == 1 or thinking.max_blocks == 0:
        return 0
    response = longest_response(thinking)
    if thinking.max_depth > 1:
        return thinking.max_depth * response
    repeated = thinking.max_blocks * (thinking.paths - 1) * (thinking.max_path_tokens + PATH_TAGS)
    return min(response, repeated)


def longest_row(thinking: Thinking, prompt: int) -> int:
    """Tokens of a trace's row at most, behind a prompt of so many.

    The engine's cache holds no more of it: in `replay` a block is joined by writing paths 2..N once more.
    """
    return prompt + longest_response(thinking) + longest_branches(thinking)


@dataclass(frozen=True, slots=True)
class RolloutLoad:
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


def rollout_cost(split: Split, thinking: Thinking, draws: RolloutLoad) -> Cost:
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
