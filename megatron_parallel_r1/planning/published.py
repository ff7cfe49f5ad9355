"""Sizes of published models, so that a run can be planned before downloading one.

From the `config.json` of each on the Hugging Face Hub.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from megatron_parallel_r1.architecture.model_config import ExpertsConfig, ModelConfig
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.hub import missing_folder

_QWEN3 = {
    "Qwen3-0.6B": ModelConfig(1024, 28, 16, 8, 128, 3072, vocab=151936, tied=True, max_positions=40960),
    "Qwen3-1.7B": ModelConfig(2048, 28, 16, 8, 128, 6144, vocab=151936, tied=True, max_positions=40960),
    "Qwen3-4B": ModelConfig(2560, 36, 32, 8, 128, 9728, vocab=151936, tied=True, max_positions=40960),
    "Qwen3-8B": ModelConfig(4096, 36, 32, 8, 128, 12288, vocab=151936, tied=False, max_positions=40960),
    "Qwen3-14B": ModelConfig(5120, 40, 40, 8, 128, 17408, vocab=151936, tied=False, max_positions=40960),
    "Qwen3-30B-A3B": ModelConfig(
        *(2048, 48, 32, 4, 128, 6144),
        vocab=151936,
        tied=False,
        max_positions=40960,
        family="qwen3_moe",
        experts=ExpertsConfig(count=128, per_token=8, ffn=768),
    ),
}
_WITHOUT_BASE = {
    "Qwen3-32B": ModelConfig(5120, 64, 64, 8, 128, 25600, vocab=151936, tied=False, max_positions=40960),
    "Qwen3-235B-A22B": ModelConfig(
        *(4096, 94, 64, 4, 128, 12288),
        vocab=151936,
        tied=False,
        max_positions=40960,
        family="qwen3_moe",
        experts=ExpertsConfig(count=128, per_token=8, ffn=1536),
    ),
}
_SMOLLM2 = ModelConfig(
    *(576, 30, 9, 3, 64, 1536),
    vocab=49152,
    rope_theta=1e5,
    rms_eps=1e-5,
    tied=True,
    max_positions=8192,
    family="llama",
)
PUBLISHED: Mapping[str, ModelConfig] = MappingProxyType(
    {f"{name}-Base": replace(shape, max_positions=32768) for name, shape in _QWEN3.items()}
    | _QWEN3
    | _WITHOUT_BASE
    | {"SmolLM2-135M": _SMOLLM2, "SmolLM2-135M-Instruct": _SMOLLM2}
)
"""By the last part of the name on the Hub, usually also the folder's name."""


def published_config(folder: Path) -> tuple[ModelConfig, bool]:
    """Returns the config of a Hugging Face folder, and whether it was read from a config.json there.

    A folder that does not exist yet stands for the published model of its name.

    Raises:
        UserError: it does not exist and no published model has its name, or its config.json is not supported.
    """
    file = folder / "config.json"
    if not file.is_file():
        if folder.name not in PUBLISHED:
            raise UserError(
                f"{folder}: no config.json; {missing_folder(folder)}, or to plan without one "
                f"name it after a published model: {', '.join(PUBLISHED)}"
            )
        return PUBLISHED[folder.name], False
    try:
        return ModelConfig.from_hf(json.loads(file.read_text(encoding="utf-8"))), True
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); copy it again") from None
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
