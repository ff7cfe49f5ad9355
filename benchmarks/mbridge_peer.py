"""mbridge's conversion on a CPU, for conversion.py: its name mapping and file writer, applied to our model.

mbridge (Apache-2.0, https://github.com/ISEEKYAN/mbridge) builds Transformer Engine models, which need a
GPU; its mapping accepts any live Megatron-Core model with Transformer Engine's names. Here that is a model of
local layers in one process, with its two norms renamed accordingly. mbridge writes no Megatron checkpoints;
Megatron-Core's `dist_checkpointing` does.

    pip install --no-deps mbridge==0.15.1 einops
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron_parallel_r1.model.gpt import Model

LOCAL = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def is_here() -> bool:
    """Returns whether mbridge is installed."""
    return find_spec("mbridge") is not None


def to_megatron(hf: Path, out: Path) -> None:
    """Loads a Hugging Face folder into a live model by mbridge; Megatron writes the checkpoint."""
    from megatron.core import dist_checkpointing

    with _bridged(hf) as (bridge, model):
        with torch.no_grad():
            bridge.load_weights(list(model), str(hf))
        out.mkdir()
        state = model[0].sharded_state_dict(metadata={"non_homogeneous_layers": True})
        dist_checkpointing.save(state, str(out))


def to_hf(like: Path, megatron: Path, out: Path) -> None:
    """Megatron loads the checkpoint, mbridge writes the folder; `like` provides config.json."""
    from megatron_parallel_r1.conversion.verify import load_with_megatron

    with _bridged(like) as (bridge, model):
        load_with_megatron(model, megatron)
        bridge.safetensor_io = bridge._get_safetensor_io(str(like))
        bridge.save_weights(list(model), str(out))


@contextmanager
def _bridged(hf: Path) -> Iterator[tuple[object, Model]]:
    from megatron_parallel_r1.checkpoint_formats.hf_folder import read_config
    from megatron_parallel_r1.distributed import process
    from megatron_parallel_r1.model.gpt import build_model

    with process.running(seed=0):
        from mbridge import AutoBridge

        bridge = AutoBridge.from_pretrained(str(hf))
        theirs = bridge._weight_name_mapping_mcore_to_hf

        def by_local_names(name: str) -> list[str]:
            for ours, fused in LOCAL.items():
                name = name.replace(ours, fused)
            return theirs(name)

        bridge._weight_name_mapping_mcore_to_hf = by_local_names
        yield bridge, build_model(read_config(hf), torch.bfloat16)
