"""What a config.json may ask for."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen3Config

from megatron_parallel_r1.architecture.families import FAMILIES
from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.errors import UserError

QWEN3 = ModelConfig(
    hidden=48, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=112, vocab=97, rope_theta=1e4, tied=False
)

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}


def test_round_trip() -> None:
    assert ModelConfig.from_hf(QWEN3.to_hf()) == QWEN3
    theirs = Qwen3Config.from_dict(QWEN3.to_hf(torch.bfloat16))
    assert ModelConfig.from_hf(theirs.to_dict()) == QWEN3
    assert theirs.dtype == torch.bfloat16


def test_a_config_of_transformers_4_is_read() -> None:
    old = QWEN3.to_hf()
    del old["rope_parameters"]
    assert ModelConfig.from_hf(old) == QWEN3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'"),
        ({"rope_scaling": LINEAR}, "rope_scaling and rope_parameters contradict each other"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type = 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "needs factor"),
        ({"rope_parameters": LINEAR | {"mscale": 0.7}}, "mscale = 0.7 of rope_type 'linear'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"hidden_size": "48"}, "hidden_size = '48' is not a whole number above 0"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads = 0 is not a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True is not a whole number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small' is not a number above 0"),
        ({"rope_parameters": None, "rope_theta": "1e4"}, "rope_theta = '1e4' is not a number above 0"),
        ({"rope_parameters": [1]}, "rope_parameters or rope_scaling is not an object"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "factor = '4' of rope_type 'linear'"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, r"rope_type = \['linear'\] is not supported"),
        ({"model_type": ["qwen3"]}, r"model_type is \['qwen3'\]"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings = None is neither true nor false"),
    ],
)
def test_what_is_not_computed_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(QWEN3.to_hf() | change)


@pytest.mark.parametrize("kind", FAMILIES)
def test_fields_that_are_no_size_may_be_missing(kind: str) -> None:
    sizes = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "intermediate_size": 96,
        "vocab_size": 97,
        **({"sliding_window": None} if kind == "mistral" else {}),
    }
    theirs = AutoConfig.for_model(kind, **sizes).to_dict()
    assert ModelConfig.from_hf({"model_type": kind, **sizes}) == ModelConfig.from_hf(theirs)


def test_a_missing_field_is_named() -> None:
    broken = QWEN3.to_hf()
    del broken["hidden_size"]
    with pytest.raises(UserError, match="'hidden_size' is missing"):
        ModelConfig.from_hf(broken)


def test_a_mistral_with_a_window_is_refused() -> None:
    """transformers gives it one of 4,096 tokens where config.json says nothing."""
    whole = replace(QWEN3, family="mistral").to_hf()
    assert whole["sliding_window"] is None and ModelConfig.from_hf(whole).family == "mistral"
    for windowed in (
        whole | {"sliding_window": 4096},
        {k: v for k, v in whole.items() if k != "sliding_window"},
    ):
        with pytest.raises(UserError, match="sliding_window = 4096 is not supported"):
            ModelConfig.from_hf(windowed)


def test_layers_of_smollm3_without_rotary_positions() -> None:
    by_interval = replace(QWEN3, family="smollm3", layers=6).to_hf()
    assert by_interval.pop("no_rope_layers") == [1] * 6
    assert ModelConfig.from_hf(by_interval).unrotated_layers == (3,)
    listed = by_interval | {"no_rope_layers": [0, 1, 1, 1, 1, 0]}
    assert ModelConfig.from_hf(listed).unrotated_layers == (0, 5)
    for wrong in ([1, 1], [1, 1, 1, 1, 1, 2], "1"):
        with pytest.raises(UserError, match="no_rope_layers is no list of 6 times 0 or 1"):
            ModelConfig.from_hf(by_interval | {"no_rope_layers": wrong})


def test_dropout_of_a_released_seed_oss_is_not_applied() -> None:
    released = replace(QWEN3, family="seed_oss").to_hf() | {"attention_dropout": 0.1, "residual_dropout": 0.1}
    assert ModelConfig.from_hf(released).to_hf()["residual_dropout"] == 0
