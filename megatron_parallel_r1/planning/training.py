"""The cost of an update for one rank, from sizes alone.

Matrix products count as in Narayanan et al. (arXiv 2104.04473, appendix): 2 operations per weight and token
forward, twice that backward. Attention counts visible pairs; its backward has five products where the forward
has two (arXiv 2307.08691). What backward needs (memory.py) is written once and read once; a ring all-reduce
over n ranks sends 2 (n - 1) / n of the data.

Letters: b bytes a number, E hidden, Q and K sizes of all query and of all key heads, F ffn.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import padded_vocab
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.planning.machine import Cost, sent
from megatron_parallel_r1.planning.memory import FLOAT32, layer_bytes, optimizer_sharers
from megatron_parallel_r1.train.target_logprobs import CHUNKS_ALIVE

BACKWARD = 2.0  # times the forward
ATTENTION_BACKWARD = 2.5
ADAM_BYTES = 28  # a weight: gradient read; two moments and a float32 weight read and written


@dataclass(frozen=True, slots=True)
class Split:
    """A model split over ranks, with `data` replicas; `number`: bytes of a weight and of an activation."""

    shape: ModelConfig
    parallel: ParallelConfig
    data: int
    number: int
    per_node: int

    @property
    def layers(self) -> float:
        """Layers of a rank, on average over the pipeline; if it is uneven by choice, of its fullest one."""
        if self.parallel.uneven:
            return max(self.parallel.stage_layers(self.shape.layers))
        return self.shape.layers / self.parallel.pipeline


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """The micro-batches of an update on one replica: their number, the tokens of one, the keys that a token
    sees on average, and the tokens with loss of one."""

    micro_batches: int
    tokens: float
    visible: float
    targets: float


def layer_weights(shape: ModelConfig) -> tuple[float, float, float]:
    """Returns a layer's weights per token: of attention, of the MLP or router, of its selected experts."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = shape.hidden * (2 * query + 2 * key)
    if shape.experts is None:
        return attention, 3 * shape.hidden * shape.ffn, 0.0
    chosen = shape.experts.per_token * 3 * shape.hidden * shape.experts.ffn
    return attention, shape.hidden * shape.experts.count, chosen


def forward_cost(split: Split, tokens: float, visible: float) -> Cost:
    """Returns the forward cost of a rank's layers for a row of `tokens`."""
    attention, mlp, experts = _layer_forward(split, tokens, visible)
    return split.layers * (attention + mlp + experts)


def update_cost(split: Split, batch: MicroBatches, elements: int, expert_elements: int = 0) -> Cost:
    """Returns the cost of one optimizer step; `elements`: weights of the rank, with those of experts."""
    parallel = split.parallel
    attention, mlp, experts = _layer_forward(split, batch.tokens, batch.visible)
    forward = attention + mlp + experts
    backward = BACKWARD * forward + Cost(attention=(ATTENTION_BACKWARD - BACKWARD) * forward.attention)
    recomputed = {"none": Cost(), "selective": mlp + experts, "full": forward}[parallel.recompute]
    micro_batch = split.layers * (forward + backward + recomputed)
    micro_batch += head_cost(split, batch.targets, backward=True)
    micro_batch += _between_stages(split, batch.tokens)
    # The pipeline bubble (arXiv 2104.04473, section 2.2).
    turns = batch.micro_batches + (parallel.pipeline - 1) / parallel.virtual
    sharers, expert_sharers = optimizer_sharers(parallel, split.data)
    place = parallel.tensor * sharers
    step = _step(split, elements - expert_elements, sharers, place)
    step += _step(split, expert_elements, expert_sharers, place) + Cost(updates=1)
    return turns * micro_batch + step


def scoring_cost(split: Split, batch: MicroBatches) -> Cost:
    """Returns the cost of the targets' log-probs, forward only."""
    micro_batch = forward_cost(split, batch.tokens, batch.visible)
    micro_batch += head_cost(split, batch.targets, backward=False)
    return (batch.micro_batches + split.parallel.pipeline - 1) * micro_batch


def head_cost(split: Split, targets: float, backward: bool) -> Cost:
    """Returns the cost of the targets' logits, which backward recomputes before its own two products."""
    rows = padded_vocab(split.shape.vocab, split.parallel.tensor) / split.parallel.tensor
    own = targets / split.parallel.context
    times, alive = (4, CHUNKS_ALIVE) if backward else (1, 3)
    return Cost(products=times * 2 * own * split.shape.hidden * rows, stream=2 * alive * FLOAT32 * own * rows)


def _layer_forward(split: Split, tokens: float, visible: float) -> tuple[Cost, Cost, Cost]:
    """Returns the forward costs of one layer: attention with both norms, MLP or router, experts."""
    shape, parallel, number = split.shape, split.parallel, split.number
    size, own = parallel.tensor, tokens / parallel.context
    query, key = shape.heads * shape.head_dim / size, shape.kv_heads * shape.head_dim / size
    first, second, chosen = layer_weights(shape)
    kept, norm, inside = layer_bytes(shape, parallel, round(tokens), number)
    summed = 2 * (size - 1) / size * own * shape.hidden * number
    gathered = (parallel.context - 1) * own * 2 * key * number
    attention = Cost(
        products=2 * own * first / size,
        attention=4 * own * visible * query,
        stream=2 * (kept + norm),
        layers=1,
    )
    attention += sent(summed, size, split.per_node)
    attention += sent(gathered, size * parallel.context, split.per_node)
    mlp = Cost(products=2 * own * second / size, stream=2 * inside)
    if parallel.expert > 1 and shape.experts is not None:
        # Each token's hidden state goes to its experts, evenly distributed, and back.
        routed = own / size * shape.experts.per_token * shape.hidden * number
        away = (parallel.expert - 1) / parallel.expert
        mlp += sent(2 * routed * away, parallel.expert, split.per_node)
    else:
        mlp += sent(summed, size, split.per_node)
    return attention, mlp, Cost(experts=2 * own * chosen / size)


def _between_stages(split: Split, tokens: float) -> Cost:
    """Returns the cost of sending activations and their gradients between stages."""
    parallel = split.parallel
    if parallel.pipeline == 1:
        return Cost()
    own = tokens / parallel.context / (parallel.tensor if parallel.sequence else 1)
    amount = 2 * parallel.virtual * own * split.shape.hidden * split.number
    world = parallel.replica_size * split.data
    return sent(amount, world, split.per_node)


def _step(split: Split, elements: int, sharers: int, place: int) -> Cost:
    """Returns the cost of reducing gradients over `sharers` ranks out of `place`, their norm, and Adam."""
    parallel = split.parallel
    if parallel.sharded_optimizer:
        # Reduce-scatter of gradients, then all-gather of weights.
        exchanged = (FLOAT32 + split.number) * elements * (sharers - 1) / sharers
    else:
        exchanged = 2 * FLOAT32 * elements * (sharers - 1) / sharers
    own = elements / sharers if parallel.sharded_optimizer else elements
    adam = Cost(stream=3 * FLOAT32 * elements + (ADAM_BYTES + split.number) * own)
    return adam + sent(exchanged, place, split.per_node)
