"""Pre-training runs on DGX H100 with published speed, to evaluate the planner's time model.

From the performance summary of Megatron-Bridge (docs.nvidia.com/nemo/megatron-bridge, "25.11 NeMo container",
pre-training on DGX-H100 in FP8 with current scaling); shapes from each model's config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron_parallel_r1.architecture.model_config import ExpertsConfig, ModelConfig
from megatron_parallel_r1.architecture.weight_table import weight_table
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.planning.machine import Cost, Machine
from megatron_parallel_r1.planning.published import PUBLISHED
from megatron_parallel_r1.planning.training import MicroBatches, Split, update_cost

BF16 = 2


@dataclass(frozen=True, slots=True)
class Run:
    """
    Attributes:
        expert: expert-parallel size.
        batch: sequences per optimizer step, in micro-batches of `micro`.
        reached: published tokens/s per GPU.
    """

    name: str
    shape: ModelConfig
    gpus: int
    parallel: ParallelConfig
    batch: int
    micro: int
    sequence: int
    reached: float
    expert: int = 1

    @property
    def data(self) -> int:
        return self.gpus // self.parallel.replica_size

    @property
    def seconds(self) -> float:
        """Published seconds per step."""
        return self.batch * self.sequence / self.gpus / self.reached

    def cost(self, machine: Machine) -> Cost:
        """Cost of a step on one GPU."""
        tokens = self.micro * self.sequence
        rows = MicroBatches(self.batch // (self.data * self.micro), tokens, self.sequence / 2, tokens)
        split = Split(self.shape, self.parallel, self.data, BF16, machine.per_node)
        return update_cost(split, rows, self._elements())

    def _elements(self) -> int:
        counts = [(weight.expert is not None, prod(weight.shape)) for weight in weight_table(self.shape)]
        dense = sum(count for is_expert, count in counts if not is_expert)
        experts = sum(count for is_expert, count in counts if is_expert)
        return (dense // self.parallel.tensor + experts // self.expert) // self.parallel.pipeline


def _llama(hidden: int, layers: int, heads: int, ffn: int) -> ModelConfig:
    return ModelConfig(hidden, layers, heads, 8, 128, ffn, vocab=128256, tied=False, family="llama")


def _split(tensor: int = 1, pipeline: int = 1, virtual: int = 1, context: int = 1) -> ParallelConfig:
    return ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        virtual=virtual,
        context=context,
        sequence=tensor > 1,
        sharded_optimizer=True,
    )


QWEN3_235B = ModelConfig(
    4096,
    94,
    64,
    4,
    128,
    12288,
    vocab=151936,
    tied=False,
    family="qwen3_moe",
    experts=ExpertsConfig(count=128, per_token=8, ffn=1536),
)
CALIBRATED_ON = {
    "products": Run(
        "Llama 3 70B", _llama(8192, 80, 64, 28672), 64, _split(4, 8, 5), batch=128, micro=1, sequence=8192,
        reached=1602,
    ),
    "experts": Run(
        "Qwen3 235B-A22B", QWEN3_235B, 256, _split(2, 8, 4), batch=2048, micro=1, sequence=4096,
        reached=1575, expert=32,
    ),
}  # fmt: skip
HELD_OUT = (
    Run("Llama 3 8B", _llama(4096, 32, 32, 14336), 8, _split(), 128, 1, 8192, reached=14451),
    Run(
        "Llama 3.1 405B", _llama(16384, 126, 128, 53248), 1024, _split(8, 8, 8, 2), 512, 1, 8192, reached=292
    ),
    Run(
        "Qwen3 30B-A3B",
        PUBLISHED["Qwen3-30B-A3B"],
        16,
        _split(1, 2, 24),
        512,
        2,
        4096,
        reached=5275,
        expert=8,
    ),
)


def overlapping(machine: Machine) -> Machine:
    """The machine with communication overlapped, as in the published runs; 80 % overlap is assumed."""
    return machine.replace(hidden=0.8)


def calibrated(kind: str, machine: Machine) -> float:
    """The rate of `products` or `experts` at which its calibration run takes the published time."""
    run = CALIBRATED_ON[kind]
    cost = run.cost(machine)
    rest = machine.seconds(cost, fp8=True) - getattr(cost, kind) * machine.seconds_each(fp8=True)[kind]
    return getattr(cost, kind) / (run.seconds - rest) / machine.fp8
