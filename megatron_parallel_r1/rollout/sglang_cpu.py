"""Makes an SGLang server on a CPU exact, and quick to start: a plugin of its group `sglang.srt.plugins`.

- Seeded draws. SGLang uses a request's seed only with `--enable-deterministic-inference`, whose kernels need
  a GPU; there, use that. The plugin passes the seeds to the sampler without it, and draws by seed and
  position as the native engine does.
- A fork. Scheduler and detokenizer are forked, which no CUDA context forbids here: spawned, each would import
  torch and SGLang anew, more than half of the CPU time of a start.
- Recorded experts stay in memory that is not pinned, for pinning it calls CUDA.

Importing this module loads neither torch nor SGLang.

Shapes: B requests of a batch, V vocabulary.
"""

from __future__ import annotations

import multiprocessing
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "parallel_r1_cpu"
# SGLang's own default under that flag.
NO_SEED = 42


def register() -> None:
    """Called by SGLang in each of its processes; does nothing unless `SGLANG_PLUGINS` names the plugin."""
    if NAME not in [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")]:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch",
        seed_batch,
        HookType.AFTER,
    )
    HookRegistry.register("sglang.srt.layers.sampler.multinomial_with_seed", draw, HookType.REPLACE)
    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", fork, HookType.AFTER)
    HookRegistry.register(
        "sglang.srt.mem_cache.pool_host.common._cuda_host_register", leave_unpinned, HookType.REPLACE
    )


def leave_unpinned(*args: object) -> None:
    """REPLACES `_cuda_host_register`, which pins the memory of recorded experts and calls CUDA for it."""


def fork(*args: object) -> None:
    """AFTER `_set_envs_and_config`, which sets the start method to `spawn`."""
    multiprocessing.set_start_method("fork", force=True)


def seed_batch(info: Any, cls: type, batch: Any, vocab_size: int) -> None:
    """AFTER `SamplingBatchInfo.from_schedule_batch`: sets its `sampling_seed`, int64 [B]."""
    import torch

    seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
    values = [NO_SEED if seed is None else seed for seed in seeds]
    info.sampling_seed = torch.tensor(values, dtype=torch.int64, device=info.device)


def draw(logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Indices int64 [B, 1] of draws from softmax(logprobs), each by its row's seed and position.

    Args:
        logprobs: [B, V], up to a constant a row; -inf is never drawn.
        seed: int64 [B].
        positions: [B], of the last token before each draw.
    """
    import torch

    from megatron_parallel_r1.rollout.native.sampler import uniform_draws

    cumulative_BV = logprobs.double().exp().cumsum(-1)
    # splitmix64 works modulo 2**64, so a negative seed is as good as any.
    seeds_B = seed.cpu().numpy().astype("uint64")
    uniform_B = torch.from_numpy(uniform_draws(seeds_B, positions.cpu().numpy() + 1)).to(logprobs.device)
    target_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
    drawn_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    # Rounding can raise the target to the sum itself, after the last index of positive weight.
    last_B1 = torch.searchsorted(cumulative_BV, cumulative_BV[:, -1:].contiguous())
    return torch.minimum(drawn_B1, last_B1)
