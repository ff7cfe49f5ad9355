"""Hugging Face to Megatron and back, bit for bit; Megatron loads what we wrote, and we what it saves."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from transformers import AutoModelForCausalLM

from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder, read_config
from megatron_parallel_r1.conversion import to_hf
from megatron_parallel_r1.conversion.shard_plan import Target
from megatron_parallel_r1.conversion.to_hf import megatron_to_hf
from megatron_parallel_r1.conversion.to_megatron import RELEASE, hf_to_megatron
from megatron_parallel_r1.conversion.verify import load_with_megatron
from megatron_parallel_r1.model import gpt, weights
from tests.unit.conversion.folders import assert_equal, targets, tensors_of, write_hf
from tests.unit.model.family_models import VARIANTS

pytestmark = pytest.mark.usefixtures("world")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_comes_back_bit_equal(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_hf, "SLICE_BYTES", 1000)  # a few rows, some in two ranks' pieces
    write_hf(tmp_path / "hf", variant, shards=3)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) >= 3
    expected = tensors_of(tmp_path / "hf")
    for target in targets(variant):
        hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", target, replace=True)
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", replace=True, shard_bytes=100_000)
        assert_equal(expected, tensors_of(tmp_path / "back"))
        index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
        megatron_to_hf(tmp_path / "back", tmp_path / "again", replace=True)
        assert_equal(expected, tensors_of(tmp_path / "again"))
        assert index["weight_map"].keys() == expected.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert read_config(tmp_path / "back") == read_config(tmp_path / "hf")
    assert theirs.config.model_type == variant.split()[0]


@pytest.mark.parametrize("variant", ["qwen3", "qwen3_moe", "qwen2", "llama"])
def test_megatron_loads_it_and_we_what_megatron_saves(variant: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", variant)
    expected = tensors_of(tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", targets(variant)[-1])
    model = gpt.build_model(read_config(tmp_path / "hf"))
    load_with_megatron(model, tmp_path / "megatron")
    assert_equal(expected, dict(weights.hf_tensors(model)))
    for name, metadata in (
        ("layer by layer", {"non_homogeneous_layers": True}),
        ("layers stacked, as Megatron-LM may", {}),
    ):
        folder = tmp_path / name / "iter_0000007"
        folder.mkdir(parents=True)
        state = model[0].sharded_state_dict(metadata=metadata)
        dist_checkpointing.save(state, str(folder), content_metadata=metadata)
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text("7")
        megatron_to_hf(tmp_path / name, tmp_path / "back", like=tmp_path / "hf", replace=True)
        assert_equal(expected, tensors_of(tmp_path / "back"))


@pytest.mark.parametrize("variant", ["qwen3", "qwen3_moe"])
def test_the_files_of_a_rank_hold_layers_of_its_stage(variant: str, tmp_path: Path) -> None:
    """That they hold what Megatron would have that rank save: tests/conversion."""
    write_hf(tmp_path / "hf", variant)
    target = Target(2, 2, 2 if "moe" in variant else 1)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", target)
    metadata = dist_checkpointing.serialization.load_tensors_metadata(str(tmp_path / "megatron" / RELEASE))
    files = {path.name for path in (tmp_path / "megatron" / RELEASE).glob("*.distcp")}
    assert files == {f"__{rank}_0.distcp" for rank in range(4 * target.expert)}
    from torch.distributed.checkpoint import FileSystemReader

    checkpoint = FileSystemReader(tmp_path / "megatron" / RELEASE).read_metadata()
    stages = {
        info.relative_path: {
            int(index.fqn.split(".")[2]) // 2
            for index in checkpoint.storage_data
            if checkpoint.storage_data[index].relative_path == info.relative_path and ".layers." in index.fqn
        }
        for info in checkpoint.storage_data.values()
    }
    assert all(len(layers) == 1 for layers in stages.values())
    assert metadata["embedding.word_embeddings.weight"].global_shape == (97, 48)


def test_a_run_can_start_from_either_form(tmp_path: Path) -> None:
    """`model.path` of a recipe goes through these two."""
    write_hf(tmp_path / "hf", "qwen3")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", Target(2, 2))
    shape, tensors = load_hf_folder(tmp_path / "megatron")
    assert shape == read_config(tmp_path / "hf")
    assert_equal(tensors_of(tmp_path / "hf"), dict(tensors))


@pytest.mark.parametrize(("vocabulary", "variant"), [(101, "qwen3"), (97, "llama"), (103, "qwen2 linear")])
def test_vocabularies_that_ranks_do_not_divide(vocabulary: int, variant: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", variant, vocab_size=vocabulary, num_attention_heads=8, num_key_value_heads=8)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", Target(tensor=8))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_equal(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back"))


def test_rows_that_fill_up_a_vocabulary_are_cut_off(tmp_path: Path) -> None:
    """Megatron-LM pads to a multiple of 128 or so; the config.json knows better."""
    write_hf(tmp_path / "hf", "qwen3")
    padded = gpt.build_model(read_config(tmp_path / "hf"))
    load = dict(weights.random_hf_tensors(padded.architecture, 0)) | tensors_of(tmp_path / "hf")
    weights.load_hf_tensors(padded, load.items())
    state = padded[0].sharded_state_dict(metadata={"non_homogeneous_layers": True})
    embedding = state["embedding.word_embeddings.weight"]
    embedding.data = torch.nn.functional.pad(embedding.data, (0, 0, 0, 31))
    embedding.local_shape = embedding.global_shape = tuple(embedding.data.shape)
    (tmp_path / "megatron").mkdir()
    dist_checkpointing.save(state, str(tmp_path / "megatron"))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", like=tmp_path / "hf")
    assert_equal(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_are_those_of_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", "qwen2")
    expected = {name: tensor.to(dtype) for name, tensor in tensors_of(tmp_path / "hf").items()}
    hf_to_megatron(tmp_path / "hf", tmp_path / "there", Target(2, 2), dtype)
    megatron_to_hf(tmp_path / "there", tmp_path / "back")
    assert_equal(expected, tensors_of(tmp_path / "back"))
    hf_to_megatron(tmp_path / "hf", tmp_path / "wide", Target())
    megatron_to_hf(tmp_path / "wide", tmp_path / "narrowed", dtype=dtype)
    assert_equal(expected, tensors_of(tmp_path / "narrowed"))
    config = json.loads((tmp_path / "narrowed" / "config.json").read_text())
    assert (config.get("dtype") or config["torch_dtype"]) == str(dtype).removeprefix("torch.")


def test_digests_are_those_of_sha256sum(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", "qwen3")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", Target(2, 2))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    for folder in ("megatron", "back"):
        checked = subprocess.run(
            ["sha256sum", "-c", "--strict", "SHA256SUMS"],
            cwd=tmp_path / folder,
            capture_output=True,
            text=True,
        )
        files = [path for path in (tmp_path / folder).rglob("*") if path.is_file()]
        assert checked.returncode == 0 and checked.stdout.count(": OK") == len(files) - 1
