"""What an update costs one process, from shapes alone.

Products count as in Narayanan et al. (arXiv 2104.04473, appendix): 2 operations a weight and token forward,
twice that backward. Attention counts the pairs that a query may see; its backward makes five products where
the forward makes two (arXiv 2307.08691). What is kept for backward (memory.py) is written once and read once;
a ring sends 2 (n - 1) / n of what n processes sum up.

Letters: b bytes a number, E hidden, Q and K sizes of all query and of all key heads, F ffn.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import padded_vocab
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.planning.machine import Cost, sent
from megatron_parallel_r1.planning.memory import CHUNKS_ALIVE, FLOAT32, layer_bytes

BACKWARD = 2.0  # times the forward
ATTENTION_BACKWARD = 2.5
ADAM_BYTES = 28  # a weight: gradient read; two moments and a float32 weight read and written


@dataclass(frozen=True, slots=True)
class Split:
    """A model over processes.

    Attributes:
        data: copies.
        number: bytes of a weight and of an activation.
        per_node: processes of a node.
    """

    shape: ModelConfig
    parallel: ParallelConfig
    data: int
    number: int
    per_node: int

    @property
    def layers(self) -> float:
        """Of a process, on average over the pipeline."""
        return self.shape.layers / self.parallel.pipeline


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """The micro-batches of an update, of one copy.

    Attributes:
        tokens: of a micro-batch.
        visible: keys that a token sees, on average.
        targets: tokens of it with loss.
    """

    micro_batches: int
    tokens: float
    visible: float
    targets: float


def layer_weights(shape: ModelConfig) -> tuple[float, float, float]:
    """Weights that a token meets in a layer: of attention, of the MLP or router, of its experts."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = shape.hidden * (2 * query + 2 * key)
    if shape.experts is None:
        return attention, 3 * shape.hidden * shape.ffn, 0.0
    chosen = shape.experts.per_token * 3 * shape.hidden * shape.experts.ffn
    return attention, shape.hidden * shape.experts.count, chosen


def forward_cost(split: Split, tokens: float, visible: float) -> Cost:
    """Of all layers of a process, for a row of so many tokens."""
    attention, mlp, experts = _layer_forward(split, tokens, visible)
    return split.layers * (attention + mlp + experts)


def update_cost(split: Split, rows: MicroBatches, elements: int) -> Cost:
    """Of one optimizer step; `elements`: weights of a process."""
    parallel = split.parallel
    attention, mlp, experts = _layer_forward(split, rows.tokens, rows.visible)
    forward = attention + mlp + experts
    backward = BACKWARD * forward + Cost(attention=(ATTENTION_BACKWARD - BACKWARD) * forward.attention)
    again = {"none": Cost(), "selective": mlp + experts, "full": forward}[parallel.recompute]
    one = split.layers * (forward + backward + again) + head_cost(split, rows.targets, backward=True)
    one += _between_stages(split, rows.tokens)
    # A pipeline's first and last micro-batches leave its other stages idle (arXiv 2104.04473, section 2.2).
    turns = rows.micro_batches + (parallel.pipeline - 1) / parallel.virtual
    return turns * one + _step(split, elements)


def scoring_cost(split: Split, rows: MicroBatches) -> Cost:
    """Of log-probs of the targets, forward alone."""
    one = forward_cost(split, rows.tokens, rows.visible) + head_cost(split, rows.targets, backward=False)
    return (rows.micro_batches + split.parallel.pipeline - 1) * one


def head_cost(split: Split, targets: float, backward: bool) -> Cost:
    """Of logits of targets, which backward makes anew before its own two products."""
    rows = padded_vocab(split.shape.vocab, split.parallel.tensor) / split.parallel.tensor
    mine = targets / split.parallel.context
    times, alive = (4, CHUNKS_ALIVE) if backward else (1, 3)
    return Cost(
        products=times * 2 * mine * split.shape.hidden * rows, stream=2 * alive * FLOAT32 * mine * rows
    )


def _layer_forward(split: Split, tokens: float, visible: float) -> tuple[Cost, Cost, Cost]:
    """Of one layer: attention with both norms, MLP or router, experts."""
    shape, parallel, number = split.shape, split.parallel, split.number
    size, mine = parallel.tensor, tokens / parallel.context
    query, key = shape.heads * shape.head_dim / size, shape.kv_heads * shape.head_dim / size
    first, second, chosen = layer_weights(shape)
    kept, norm, inside = layer_bytes(shape, parallel, round(tokens), number)
    summed = 2 * (size - 1) / size * mine * shape.hidden * number
    gathered = (parallel.context - 1) * mine * 2 * key * number
    attention = Cost(
        products=2 * mine * first / size,
        attention=4 * mine * visible * query,
        stream=2 * (kept + norm),
        layers=1,
    )
    attention += sent(summed, size, split.per_node)
    attention += sent(gathered, size * parallel.context, split.per_node)
    mlp = Cost(products=2 * mine * second / size, stream=2 * inside) + sent(summed, size, split.per_node)
    return attention, mlp, Cost(experts=2 * mine * chosen / size)


def _between_stages(split: Split, tokens: float) -> Cost:
    """Activations and their gradients to the next and the previous stage."""
    parallel = split.parallel
    if parallel.pipeline == 1:
        return Cost()
    mine = tokens / parallel.context / (parallel.tensor if parallel.sequence else 1)
    amount = 2 * parallel.virtual * mine * split.shape.hidden * split.number
    world = parallel.replica_size * split.data
    return sent(amount, world, split.per_node)


def _step(split: Split, elements: int) -> Cost:
    """Gradients summed over data and context ranks, their norm, and Adam."""
    parallel = split.parallel
    sharers = split.data * parallel.context
    place = parallel.tensor * sharers
    if parallel.sharded_optimizer:
        # Gradients are summed to shards, then each shard's weights are gathered.
        exchanged = (FLOAT32 + split.number) * elements * (sharers - 1) / sharers
    else:
        exchanged = 2 * FLOAT32 * elements * (sharers - 1) / sharers
    mine = elements / sharers if parallel.sharded_optimizer else elements
    adam = Cost(stream=3 * FLOAT32 * elements + (ADAM_BYTES + split.number) * mine, updates=1)
    return adam + sent(exchanged, place, split.per_node)
