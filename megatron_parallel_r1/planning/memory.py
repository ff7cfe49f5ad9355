"""Weights of each pipeline rank under a parallel layout, and the memory that a rank needs, from sizes alone.

Activations are counted as in Korthikanti et al., "Reducing Activation Recomputation in Large Transformer
Models" (arXiv 2205.05198, section 4): what autograd stores of a layer for backward, tensor by tensor. Here
attention stores no scores and no mask (model/attention/), there is no dropout, RMSNorm stores its input and a
scale, the MLP is SwiGLU, with Megatron's unfused gate or the fused one, and logits exist a chunk at a time
(train/target_logprobs.py).

Not counted: the float32 copies of bfloat16 in attention on a CPU (model/attention/sdpa.py), temporaries of
kernels, gradients of activations (about one layer's widest tensor), communication buffers, the CUDA context,
and the allocator's fragmentation.

Letters: b bytes a number, E hidden, Q and K sizes of all query and of all key heads, D of one, F ffn.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import EMBEDDING, HEAD, padded_vocab, weight_table
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.rollout.native.page_table import PageTable
from megatron_parallel_r1.train.target_logprobs import CHUNKS_ALIVE, chunk_targets

FLOAT32, INDEX = 4, 8
RECORDED = 2  # bytes of the number of an expert that the engine chose


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of one rank.

    Attributes:
        weights: of the trainer.
        gradients: Megatron's buffer, float32.
        optimizer: Adam's two moments in float32, and master weights where the model's are not float32.
        activations: of all micro-batches in flight.
        logits: of the loss, on the last pipeline stage.
        reference: weights of the reference policy of a KL term.
        engine: weights of an in-process engine, and whole copies that wait for it (rl/rollout_queue.py).
        cache: its KV cache.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    reference: int
    engine: int
    cache: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class Workload:
    """What memory depends on beside the weights.

    Attributes:
        row: tokens of the longest packed row.
        micro_batches: of one update.
        slots: that the engine's cache must hold; None: no engine decodes in process.
        reference: whether a KL term needs a second model.
        staleness: updates that rollouts may be behind.
        fused: whether the MLP is `model.fused_swiglu`.
    """

    row: int
    micro_batches: int
    slots: int | None = None
    reference: bool = False
    staleness: int = 0
    fused: bool = False


def memory_use(
    shape: ModelConfig, parallel: ParallelConfig, part: PipelinePart, data: int, number: int, work: Workload
) -> MemoryUse:
    """Returns the memory of a rank that holds `part`.

    Args:
        data: data-parallel replicas.
        number: bytes of a weight and of an activation, 4 or 2.
    """
    weights = number * part.elements
    table = weight_table(shape)
    whole = number * sum(prod(size) for weight in table for _, size in weight.parts)
    copies = (work.staleness + 1) * whole if work.staleness else 0
    # An in-process engine has all layers, and all experts.
    engine = number * sum(prod(weight.shard_shape(parallel.tensor)) for weight in table)
    sharers, expert_sharers = optimizer_sharers(parallel, data)
    shards = ((part.elements - part.expert_elements, sharers), (part.expert_elements, expert_sharers))
    return MemoryUse(
        weights=weights,
        gradients=FLOAT32 * part.elements,
        optimizer=sum(optimizer_bytes(*shard, number, parallel.sharded_optimizer) for shard in shards),
        activations=activation_bytes(shape, parallel, part, work, number),
        logits=logit_bytes(shape, parallel, work, number) if part.last else 0,
        reference=weights if work.reference else 0,
        engine=(engine + copies) if work.slots is not None else 0,
        cache=cache_bytes(shape, parallel, work.slots, number) if work.slots is not None else 0,
    )


def optimizer_sharers(parallel: ParallelConfig, data: int) -> tuple[int, int]:
    """Returns over how many ranks Adam's state may be sharded: data and context ranks, and for experts those
    that hold the same ones."""
    sharers = data * parallel.context
    return sharers, sharers * parallel.tensor // (parallel.expert * parallel.expert_split)


def optimizer_bytes(elements: int, sharers: int, number: int, sharded: bool) -> int:
    """Returns the bytes of Adam's state, or of a shard of it."""
    master = FLOAT32 if number < FLOAT32 else 0
    return (2 * FLOAT32 + master) * (-(-elements // sharers) if sharded else elements)


def activation_bytes(
    shape: ModelConfig, parallel: ParallelConfig, part: PipelinePart, work: Workload, number: int
) -> int:
    """Returns the activations that backward needs of all micro-batches in flight on a rank.

    With `full` recompute each layer stores its input, and one layer at a time is complete; with `selective`
    one MLP at a time is.
    """
    attention, norm, mlp = layer_bytes(shape, parallel, work.row, number, work.fused)
    tokens, narrow = _tokens(parallel, work.row)
    kept, again = {
        "none": (attention + norm + mlp, 0),
        "selective": (attention + norm, mlp),
        "full": (number * shape.hidden * narrow, attention + norm + mlp),
    }[parallel.recompute]
    forwards = chunks_in_flight(parallel, part.rank, work.micro_batches)
    total = forwards * len(part.chunks[0]) * kept + again
    if parallel.recompute == "full":
        # Rotary angles: one tensor for all layers; otherwise each layer stores cosines and sines.
        total += forwards * FLOAT32 * shape.head_dim * tokens
    if part.last:
        # The final norm, and its output for the tokens that predict one with loss: at most all.
        total += narrow * _norm(shape.hidden, number) + number * shape.hidden * tokens
    return total


def layer_bytes(
    shape: ModelConfig, parallel: ParallelConfig, row: int, number: int, fused: bool = False
) -> tuple[int, int, int]:
    """Returns what one layer stores of a row: for attention, the norm before the MLP, and the MLP.

    Attention: its norm and the norm's output E b, which the projection stores; the projection's output,
    (Q + 2 K) b, of which the norm of keys and attention's values are views, and a copy Q b of the queries if
    there are several groups; a scale of each head's norm; cosines and sines for both, 4 D b; the rotated
    query Q b and key K b; the output Q b and its sums. With context parallelism key and value are copies of
    the whole row, or with `gather_again` of this rank's part. MLP: gate and up, silu(gate), up + 0, and their
    product, 5 F b. Experts: the same for each selected expert (k of n), the product scaled by the router's
    weight, and a copy of the token and of that float32 weight, (6 F + E) b + 4; the router's choice and its
    inverse as int64 and their softmax in float32 (of all n where the weights are not renormalized), 20 k, and
    the weights and a mask of all experts, 5 n.
    Under expert parallelism a rank gets as many tokens as it sends, if they are evenly routed. A fused SwiGLU
    stores gate, up and the product, 3 F b, with experts scaled already.
    """
    tokens, narrow = _tokens(parallel, row)
    size = parallel.tensor
    heads, groups, dim = shape.heads // size, shape.kv_heads // size, shape.head_dim
    query, key = heads * dim, groups * dim
    normed = narrow * (_norm(shape.hidden, number) + number * shape.hidden)
    projected = query + 2 * key + (query if groups > 1 else 0)
    per_token = number * (projected + 4 * dim + 2 * query) + FLOAT32 * (2 * heads + groups)
    seen = key if parallel.context == 1 else 2 * key
    held = tokens if parallel.gather_again else row
    attention = normed + tokens * per_token + held * number * seen
    if shape.experts is None:
        return attention, normed, tokens * number * (3 if fused else 5) * (shape.ffn // size)
    chosen = shape.experts
    stored = (3 if fused else 6) * (chosen.ffn // parallel.expert_split)
    inside = number * (stored + shape.hidden) + FLOAT32
    scored = chosen.per_token if chosen.renormalized else chosen.count
    routed = 2 * INDEX * chosen.per_token + FLOAT32 * scored + (FLOAT32 + 1) * chosen.count
    # Ranks that split each expert all get the tokens of the tensor group.
    arriving = narrow if parallel.expert > 1 else tokens
    return attention, normed, arriving * chosen.per_token * inside + narrow * routed


def chunks_in_flight(parallel: ParallelConfig, rank: int, micro_batches: int) -> int:
    """Returns the most forwards of one stage whose backward is still to come, on a pipeline rank.

    1F1B (arXiv 2205.05198, section 4.2.3; 2104.04473): rank p has p micro-batches fewer than the pipeline's
    length; interleaved, it warms up with all its stages in turn.
    """
    remaining = parallel.pipeline - rank
    if parallel.virtual == 1:
        return min(remaining, micro_batches)
    warm_up = 2 * (remaining - 1) + (parallel.virtual - 1) * parallel.pipeline
    return min(warm_up + 1, micro_batches * parallel.virtual)


def logit_bytes(shape: ModelConfig, parallel: ParallelConfig, work: Workload, number: int) -> int:
    """Returns the bytes of `target_logprobs`' backward.

    The gradients of the head in float32 and of the hidden states, beside either two chunks of logits or one
    chunk with its gradient and its product for the head.
    """
    rows, own = padded_vocab(shape.vocab, parallel.tensor) // parallel.tensor, work.row // parallel.context
    logits = rows * min(own, chunk_targets(rows, shape.hidden))
    product = number * rows * shape.hidden + (FLOAT32 + number) * logits
    gradients = (FLOAT32 * rows + number * own) * shape.hidden
    return gradients + max(CHUNKS_ALIVE * FLOAT32 * logits, product)


def cache_bytes(shape: ModelConfig, parallel: ParallelConfig, slots: int, number: int) -> int:
    """Returns the bytes of the native engine's KV cache, whose number of slots grows by doubling.

    Beside keys and values it has the experts of each token (train/routing.py).
    """
    room = PageTable().slot_count
    while room < slots:
        room *= 2
    chosen = RECORDED * shape.experts.per_token if shape.experts else 0
    return room * shape.layers * (2 * (shape.kv_heads // parallel.tensor) * shape.head_dim * number + chosen)


def _norm(width: int, number: int) -> int:
    """Returns the bytes that RMSNorm stores of a token: its input, and a scale."""
    return number * width + FLOAT32


def _tokens(parallel: ParallelConfig, row: int) -> tuple[int, int]:
    """Returns the tokens of a row on a rank: within a layer, and where sequence parallelism splits them."""
    tokens = row // parallel.context
    return tokens, tokens // (parallel.tensor if parallel.sequence else 1)


Named = tuple[str, tuple[int, ...]]
FINAL_NORM = "decoder.final_layernorm.weight"


@dataclass(frozen=True, slots=True)
class PipelinePart:
    """The weights of one pipeline rank; all tensor- and expert-parallel ranks have the same shapes.

    Attributes:
        rank: in the pipeline.
        chunks: the layers, from 0, of each of its stages; several if stages are interleaved.
        weights: Megatron's names in a whole model, with the shape of this rank's part.
        last: whether logits are computed here.
    """

    rank: int
    chunks: tuple[range, ...]
    weights: tuple[Named, ...]
    last: bool

    @property
    def layers(self) -> int:
        return sum(map(len, self.chunks))

    @property
    def elements(self) -> int:
        return sum(prod(size) for _, size in self.weights)

    @property
    def expert_elements(self) -> int:
        """Those of experts."""
        return sum(prod(size) for name, size in self.weights if ".experts." in name)


def pipeline_parts(shape: ModelConfig, parallel: ParallelConfig) -> tuple[PipelinePart, ...]:
    """Returns the part of each pipeline rank; the layout must divide the model (`check_parallel`).

    Interleaved stages are assigned in turn (arXiv 2104.04473): rank p has stages p, p + pipeline, and so on.
    The last stage of a tied model has a copy of the embedding for its logits, unless it also embeds.
    """
    counts = parallel.stage_layers(shape.layers)
    each = counts[0] // parallel.virtual
    experts = shape.experts.count // parallel.expert if shape.experts else 0
    sizes = {
        weight.name: weight.shard_shape(parallel.tensor if weight.expert is None else parallel.expert_split)
        for weight in weight_table(shape)
        if weight.expert is None or weight.expert < experts
    }
    parts = []
    for rank in range(parallel.pipeline):
        if parallel.virtual == 1:
            starts, each = [sum(counts[:rank])], counts[rank]
        else:
            starts = [(rank + turn * parallel.pipeline) * each for turn in range(parallel.virtual)]
        chunks = tuple(range(start, start + each) for start in starts)
        last = rank == parallel.pipeline - 1
        names = [EMBEDDING] if rank == 0 else []
        for layer in (layer for chunk in chunks for layer in chunk):
            names += [name for name in sizes if name.startswith(f"decoder.layers.{layer}.")]
        if last:
            names.append(FINAL_NORM)
            if not shape.tied:
                names.append(HEAD)
            elif rank > 0:
                names.append(EMBEDDING)
        parts.append(PipelinePart(rank, chunks, tuple((name, sizes[name]) for name in names), last))
    return tuple(parts)
