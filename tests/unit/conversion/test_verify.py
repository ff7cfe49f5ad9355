"""`verify.py`: equal models of either form, their logits by two implementations, and unequal models."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_parallel_r1.conversion.checkpoint_source import open_source
from megatron_parallel_r1.conversion.command import verify_command
from megatron_parallel_r1.conversion.shard_plan import Target
from megatron_parallel_r1.conversion.to_hf import megatron_to_hf
from megatron_parallel_r1.conversion.to_megatron import hf_to_megatron
from megatron_parallel_r1.conversion.verify import compare_logits
from tests.unit.conversion.folders import tensors_of, write_hf


@pytest.mark.parametrize("variant", ["qwen3 yarn", "qwen3_moe", "qwen2", "llama"])
def test_a_model_is_the_same_in_either_form(
    variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    write_hf(hf, variant, shards=3)
    hf_to_megatron(hf, megatron, Target(2, 2))
    megatron_to_hf(megatron, back)
    for one, two in ((hf, back), (megatron, hf)):
        assert verify_command([str(one), str(two)]) == 0
        output = capsys.readouterr().out
        assert f"all {len(tensors_of(hf))} tensors are bit-equal" in output
        assert "logits, our model of both: at most 0.0e+00 apart" in output
        theirs = "first" if one is hf else "second"
        assert f"logits, our model of the first and transformers of the {theirs}: at most " in output


def test_logits_tell_apart_what_is_not_the_same(tmp_path: Path) -> None:
    """One number of one norm; the tensors are not looked at here."""
    write_hf(tmp_path / "one", "qwen2")
    write_hf(tmp_path / "two", "qwen2")
    file = tmp_path / "two" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.3.post_attention_layernorm.weight"][5] += 0.1
    save_file(tensors, file, metadata={"format": "pt"})
    hf_to_megatron(tmp_path / "two", tmp_path / "changed", Target())
    one, changed = open_source(tmp_path / "one"), open_source(tmp_path / "changed")
    apart, far = compare_logits(one, changed)
    assert list(apart) == ["our model of both", "our model of the first and transformers of the first"]
    assert len(far) == 1 and far[0].startswith("logits of our model of both differ by ")
    # Ours of the changed one against theirs of the other.
    _, far = compare_logits(changed, one)
    assert len(far) == 2
