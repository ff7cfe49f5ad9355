"""Maps a rank's training state to the tensors of a checkpoint.

A checkpoint holds whole tensors whose names and shapes do not depend on the parallel layout. Each rank
describes every piece of its memory as a rectangle of such a tensor; saving and loading under different
layouts need no more. Names are those of Megatron's checkpoints: the parameter's, with its layer's number in
the whole model, prefixed by `optimizer.state.{exp_avg,exp_avg_sq,fp32_param}.` for optimizer state. They are
the same for a distributed optimizer and a plain one.

Besides tensors there is the layers' extra state, opaque bytes: the histories of FP8's delayed scaling.
Megatron determines which rank saves which, and the names. All ranks of a pipeline stage hold the same, since
the largest numbers are reduced over them, so a run may resume under another layout.

Shapes: N elements in a row of memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory, is_main_replica
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor
from torch.nn import Parameter

from megatron_parallel_r1.model.gpt import Model, PathGPT
from megatron_parallel_r1.model.weights import plain
from megatron_parallel_r1.train.trainer import Trainer

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class TensorBlock:
    """A rectangle of a whole tensor that this rank holds as consecutive elements of a parameter.

    Attributes:
        key: name of the whole tensor.
        whole: its shape: one or two sizes, preceded by the number of experts for expert weights.
        corner: indices in it of the block's first element.
        rows, width: shape of the block; a vector is one row.
        origin: offset of the block's first element in the flattened parameter.
        replica: (pipeline, tensor, data) number among the ranks that hold the same block; all 0 saves it.
        leading: number of leading indices, an expert's, that are constant over the block.
    """

    key: str
    whole: tuple[int, ...]
    corner: tuple[int, ...]
    rows: int
    width: int
    origin: int
    replica: tuple[int, int, int]
    leading: int = 0

    @classmethod
    def of(cls, described: ShardedTensor, origin: int, vocabulary: int) -> TensorBlock:
        """From Megatron's description. A block of an embedding ends with the vocabulary: the padding rows
        after it are zero and stay so."""
        whole, (*rows, width) = described.global_shape, described.local_shape
        rows = rows[0] if rows else 1
        if described.allow_shape_mismatch:
            whole = (vocabulary, *whole[1:])
            rows = max(0, min(rows, vocabulary - described.global_offset[0]))
        return cls(
            key=described.key,
            whole=tuple(whole),
            leading=len(whole) - len(described.local_shape),
            corner=described.global_offset,
            rows=rows,
            width=width,
            origin=origin,
            replica=described.replica_id,
        )

    def parts(
        self, memory_N: Tensor, start: int = 0, name: str = "", replica: tuple[int, int, int] | None = None
    ) -> Iterator[ShardedTensor]:
        """The block's elements in `memory_N`, as rectangles whose data are views of it.

        Args:
            memory_N: elements of the parameter, or of a tensor of its shape, from element `start` on. If they
                begin or end within a row of the block, that row is a rectangle of its own.
            name: prefix of the key.
            replica: replaces the block's.
        """
        dims = len(self.whole) - self.leading
        lead, first = self.corner[: self.leading], self.corner[self.leading]
        ones = (1,) * self.leading
        at = max(start - self.origin, 0)
        end = min(start + len(memory_N) - self.origin, self.rows * self.width)
        while at < end:
            row, column = divmod(at, self.width)
            if column == 0 and end - at >= self.width:
                height, columns = (end - at) // self.width, self.width
            else:
                height, columns = 1, min(end - at, self.width - column)
            stop = at + height * columns
            sizes = (*ones, *(height, columns)[-dims:])
            memory = slice(at + self.origin - start, stop + self.origin - start)
            yield ShardedTensor(
                key=name + self.key,
                data=memory_N[memory].view(sizes),
                dtype=memory_N.dtype,
                local_shape=sizes,
                global_shape=self.whole,
                global_offset=(*lead, *(first + row, self.corner[-1] + column)[-dims:]),
                axis_fragmentations=None,
                replica_id=replica or self.replica,
            )
            at = stop


def live_parts(trainer: Trainer) -> list[ShardedTensor]:
    """Everything of a trainer that a checkpoint holds; the `data` of a part is the live memory.

    That of a matrix stored in FP8 is a copy: `cast_matrices` restores the matrix from the optimizer's.
    """
    begin_state(trainer.optimizer)
    parts: list[ShardedTensor] = []
    for parameter, block in _blocks(trainer.model):
        parts += block.parts(_flat(plain(parameter)))
        for inner in _inner(trainer.optimizer):
            if isinstance(inner, DistributedOptimizer):
                parts += _shared_state(inner, parameter, block)
            else:
                parts += _own_state(inner, parameter, block)
    return parts


def begin_state(optimizer: MegatronOptimizer) -> None:
    """Creates Adam's zero moments, which it would otherwise create in its first step."""
    for inner, parameter in _trained(optimizer):
        state = inner.optimizer.state[parameter]
        if not state:
            state.update({name: torch.zeros_like(parameter.data) for name in MOMENTS})
            if _counts_each(inner):
                # On the device, where the fused Adam reads it.
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)


def set_optimizer_steps(trainer: Trainer, steps: int) -> None:
    """Sets the steps that Adam's bias correction counts; call `begin_state` first."""
    trainer.optimizer_steps = steps
    for inner, parameter in _trained(trainer.optimizer):
        if _counts_each(inner):
            inner.optimizer.state[parameter]["step"].fill_(steps)
        else:
            for group in inner.optimizer.param_groups:
                group["step"] = steps


def _inner(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _trained(optimizer: MegatronOptimizer) -> Iterator[tuple[MegatronOptimizer, Tensor]]:
    """Yields each tensor that an Adam updates, with the Megatron optimizer around that Adam."""
    for inner in _inner(optimizer):
        for group in inner.optimizer.param_groups:
            yield from ((inner, parameter) for parameter in group["params"])


def _counts_each(inner: MegatronOptimizer) -> bool:
    """Whether Adam counts steps per tensor, as torch's does; fused ones count per group."""
    return isinstance(inner.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _blocks(model: Model) -> Iterator[tuple[Parameter, TensorBlock]]:
    """Yields this rank's parameters and their blocks; SwiGLU's first matrix holds two."""
    for stage in model:
        # Homogeneous layers would be stacked in one tensor with a further dimension.
        for entry in stage.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values():
            if isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
                blocks = [entry] if isinstance(entry, ShardedTensor) else entry.build()
                # One after the other; a matrix stored in FP8 has no offsets in memory.
                origin = 0
                for block in blocks:
                    yield entry.data, TensorBlock.of(block, origin, model.architecture.vocab)
                    origin += block.data.numel()


def _own_state(inner: MegatronOptimizer, parameter: Parameter, block: TensorBlock) -> Iterator[ShardedTensor]:
    """State of a plain optimizer, which holds whole parameters on each data-parallel rank."""
    main = getattr(parameter, "main_param", parameter)
    if main in inner.optimizer.state:
        for name, memory_N in _state(inner, main, parameter.dtype):
            yield from block.parts(memory_N, name=name)


def _shared_state(
    inner: DistributedOptimizer, parameter: Parameter, block: TensorBlock
) -> Iterator[ShardedTensor]:
    """State of a distributed optimizer, where each data-parallel rank has its own range of elements."""
    if parameter in inner.model_param_group_index_map:
        group, index = inner.model_param_group_index_map[parameter]
        main = inner.optimizer.param_groups[group]["params"][index]
        start = inner._get_model_param_range_map(parameter)["param"].start
        for name, memory_N in _state(inner, main, parameter.dtype):
            yield from block.parts(memory_N, start, name, (*block.replica[:2], 0))


def _state(inner: MegatronOptimizer, main: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Adam's moments for a tensor that it updates, and that tensor if it is not the parameter itself."""
    if main.dtype != dtype:
        yield "optimizer.state.fp32_param.", _flat(main)
    for name in MOMENTS:
        yield f"optimizer.state.{name}.", _flat(inner.optimizer.state[main][name])


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)


def cast_matrices(trainer: Trainer) -> None:
    """Casts the matrices that are stored in FP8 from the optimizer's float32 copies, as its step does."""
    if not trainer.model.config.fp8_param:
        return
    for inner in _inner(trainer.optimizer):
        if isinstance(inner, DistributedOptimizer):  # others are refused
            inner._copy_main_params_to_model_params()
    for stage in trainer.wrapped:
        stage.start_param_sync()


EXTRA = "extra_states.safetensors"
# Without it Transformer Engine reads no extra state of delayed scaling, which is a pickle.
TRUST = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def extra_states(model: Model) -> dict[str, Tensor]:
    """Copies (uint8) of the extra states that this rank saves; layers without any are omitted."""
    return {
        entry.unique_key: entry.data.to("cpu", copy=True)
        for stage in model
        for _, entry in _described(stage)
        if entry.data is not None and entry.data.numel() and is_main_replica(entry.replica_id)
    }


def set_extra_states(model: Model, states: Mapping[str, Tensor]) -> None:
    """Restores the extra state of each layer of this rank.

    Args:
        states: extra states of all layers. They are pickles, which can run code: take them only from a
            checkpoint whose digests have been checked.
    """
    with _trusted():
        for stage in model:
            own = {
                n: states[entry.unique_key] for n, entry in _described(stage) if entry.unique_key in states
            }
            if own:
                stage.load_state_dict(own, strict=False)


def _described(stage: PathGPT) -> Iterator[tuple[str, ShardedObject]]:
    """Extra states by the names of the stage's `load_state_dict`."""
    described = stage.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    yield from ((name, entry) for name, entry in described.items() if isinstance(entry, ShardedObject))


@contextmanager
def _trusted() -> Iterator[None]:
    before = os.environ.get(TRUST)
    os.environ[TRUST] = "1"
    try:
        yield
    finally:
        del os.environ[TRUST]
        if before is not None:
            os.environ[TRUST] = before
