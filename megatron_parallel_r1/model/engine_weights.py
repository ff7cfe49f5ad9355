"""The parameters of Transformer Engine's layers: named as the local layers name theirs, and set whole.

Transformer Engine multiplies right behind a norm, in one module that has the weights of both. In sharded
checkpoints Megatron's local layers already take its names (`sharded_state_dict_keys_map`), so these are the
same; only the names of live parameters differ.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import Parameter

FUSED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def local_name(name: str) -> str:
    """The name of a layer's parameter, given without the layer's own, in a model of local layers."""
    return FUSED.get(name, name)


def set_weight(parameter: Parameter, value: Tensor) -> None:
    """Sets a parameter, of whatever kind, and what its float32 copy in the optimizer will begin from.

    A matrix that is kept in FP8 remembers the numbers that it was born with for that copy; these are not the
    weights, which come later.
    """
    parameter.copy_(value)
    if hasattr(parameter, "_high_precision_init_val"):
        parameter._high_precision_init_val = value.to("cpu", parameter._high_precision_init_val.dtype)
