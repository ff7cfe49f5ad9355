"""Stop and resume equals never stopped, bit for bit; half a checkpoint is none, damage is found."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import load_hf_tensors
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.train.checkpoints.folder import Checkpoints
from megatron_parallel_r1.train.checkpoints.sharded import live_parts, set_optimizer_steps
from megatron_parallel_r1.train.checkpoints.writer import CheckpointWriter
from megatron_parallel_r1.train.micro_batch import MicroBatch
from megatron_parallel_r1.train.trainer import Adam, Trainer
from tests.unit.model.family_models import family_model
from tests.unit.rollout.tiny import native_engine, random_prompts, tiny_qwen3, traces_of
from tests.unit.train.test_exactness import micro_batches

Train = Callable[[Trainer, int], list[float]]


@pytest.fixture
def train(trainer_of) -> Train:
    """Some SFT steps on the same rows each time; their losses."""
    traces = traces_of(native_engine(tiny_qwen3()), Thinking(max_response_tokens=60), random_prompts(8))
    batches: list[MicroBatch] = []

    def steps(trainer: Trainer, count: int) -> list[float]:
        if not batches:
            batches.extend(micro_batches(trainer, traces, "isolated", 300))
        return [
            trainer.update(batches, lambda logprobs_N, *_: (-logprobs_N.sum(), {}), 1e-3).loss
            for _ in range(count)
        ]

    return steps


def memory(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of all that a checkpoint holds."""
    found = {f"{part.key} {part.global_offset}": part.data.clone() for part in live_parts(trainer)}
    return found | {"steps": torch.tensor(trainer.optimizer_steps)}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_resume_is_bit_exact(trainer_of, train: Train, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    whole = trainer_of()
    train(whole, 2)
    checkpoints.save(whole, 2, {"stream": {"position": 16}})
    after = train(whole, 2)
    checkpoints.settle()

    resumed = trainer_of(seed=5)
    assert checkpoints.restore(resumed) == (2, {"stream": {"position": 16}})
    assert train(resumed, 2) == after
    assert_same(memory(resumed), memory(whole))


@pytest.mark.parametrize("variant", ["qwen3_moe", "qwen2", "llama tied"])
def test_every_family_resumes_bit_for_bit(variant: str, train: Train, tmp_path: Path) -> None:
    def trainer(seed: int) -> Trainer:
        family_model(variant, seed, num_hidden_layers=2).save_pretrained(tmp_path / str(seed))
        shape, tensors = load_hf_folder(tmp_path / str(seed))
        model = build_model(shape)
        load_hf_tensors(model, tensors)
        return Trainer(model, Adam(lr=1e-3))

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    whole = trainer(seed=0)
    train(whole, 2)
    checkpoints.save(whole, 2, {})
    after = train(whole, 2)
    checkpoints.settle()
    resumed = trainer(seed=5)
    assert checkpoints.restore(resumed)[0] == 2
    assert train(resumed, 2) == after
    assert_same(memory(resumed), memory(whole))


def test_a_checkpoint_before_any_step_and_into_a_trained_optimizer(
    trainer_of, train: Train, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path)
    fresh = trainer_of()
    checkpoints.save(fresh, 0, {})
    expected = train(fresh, 2)
    trained = trainer_of(seed=5)
    train(trained, 3)
    assert checkpoints.restore(trained) == (0, {})
    assert trained.optimizer_steps == 0
    assert train(trained, 2) == expected == train(trainer_of(), 2)


def test_all_that_adam_remembers_is_kept(trainer_of, train: Train) -> None:
    trainer = trainer_of()
    train(trainer, 1)
    (inner,) = trainer.optimizer.chained_optimizers
    remembered = [value for state in inner.optimizer.state.values() for value in state.values()]
    elements = sum(value.numel() for value in remembered if value.dim())
    parts = live_parts(trainer)
    assert sum(part.data.numel() for part in parts if part.key.startswith("optimizer")) == elements > 0
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert sum(part.data.numel() for part in parts if not part.key.startswith("optimizer")) == parameters
    assert {*next(iter(inner.optimizer.state.values()))} == {"step", "exp_avg", "exp_avg_sq"}
    set_optimizer_steps(trainer, 7)
    train(trainer, 1)
    assert {int(state["step"]) for state in inner.optimizer.state.values()} == {8}
    assert trainer.optimizer_steps == 8


def test_steps_taken_while_it_is_written_change_nothing_of_it(
    trainer_of, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, trainer, may_write = Checkpoints(tmp_path), trainer_of(), threading.Event()
    train(trainer, 1)
    write = CheckpointWriter._write

    def held_up(writing: CheckpointWriter) -> None:
        assert may_write.wait(60)
        write(writing)

    monkeypatch.setattr(CheckpointWriter, "_write", held_up)
    expected = memory(trainer)
    state = {"drawn": [1]}
    checkpoints.save(trainer, 1, state)
    train(trainer, 2)
    state["drawn"].append(2)
    checkpoints.poll()
    assert not list(tmp_path.glob("step_*"))
    may_write.set()
    checkpoints.settle()
    trained = memory(trainer)
    assert any(not torch.equal(trained[name], expected[name]) for name in expected)
    assert checkpoints.restore(trainer) == (1, {"drawn": [1]})
    assert_same(memory(trainer), expected)


def test_poll_completes_what_is_written(trainer_of, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.poll()
    checkpoints.save(trainer_of(), 3, {})
    checkpoints._underway.writing._thread.join(60)
    checkpoints.poll()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]


def test_only_complete_checkpoints_count_and_few_are_kept(trainer_of, train: Train, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    trainer = trainer_of()
    assert checkpoints.restore(trainer) == (0, {})
    for step in (1, 2, 3):
        checkpoints.save(trainer, step, {})
    checkpoints.settle()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]
    for left in (".writing_0123", ".deleting_0123"):
        shutil.copytree(tmp_path / "step_000003", tmp_path / left)
    assert checkpoints.restore(trainer)[0] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]


@pytest.mark.parametrize(
    ("rule", "scores", "kept"),
    [
        (None, [3, 2, 1], [3]),
        ("max", [3, 2, 1], [1, 3]),
        ("min", [3, 2, 1], [3]),
        ("min", [1, 2, 3], [1, 3]),
        ("max", [2, 5, 5, 1], [3, 4]),
        ("min", [2, 1, 1, 5], [3, 4]),
        ("max", [None, float("nan"), 0.5, None], [3, 4]),
        ("max", [None, None], [2]),
    ],
)
def test_the_best_is_kept_besides_the_last(
    trainer_of, tmp_path: Path, rule: str | None, scores: list[float | None], kept: list[int]
) -> None:
    trainer = trainer_of()
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=rule)
    for step, score in enumerate(scores, start=1):
        checkpoints.save(trainer, step, {}, score)
    checkpoints.settle()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:06d}" for step in kept]


@pytest.fixture
def two(trainer_of, train: Train, tmp_path: Path) -> tuple[Checkpoints, Path, dict[str, torch.Tensor]]:
    """Checkpoints of steps 1 and 2, their folder, and what was trained at step 1."""
    folder = tmp_path / "checkpoints"
    checkpoints, trainer = Checkpoints(folder), trainer_of()
    train(trainer, 1)
    first = memory(trainer)
    checkpoints.save(trainer, 1, {"at": 1})
    train(trainer, 1)
    checkpoints.save(trainer, 2, {"at": 2})
    checkpoints.settle()
    return checkpoints, folder, first


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(place: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        file.write_bytes(content)

    return damage


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut short": truncate,
    "emptied": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "missing": Path.unlink,
    "first byte": flip(0),
    "a byte within": flip(0.37),
    "last byte": flip(1),
}


def test_any_damage_to_any_file_is_named_and_the_checkpoint_before_is_used(
    two, trainer_of, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints, folder, first = two
    saved = shutil.copytree(folder, tmp_path / "saved")
    names = sorted(path.name for path in (folder / "step_000002").iterdir())
    expected = {".metadata", "__0_0.distcp", "common.pt", "metadata.json", "manifest.json", "manifest.sha256"}
    assert {*names} == expected
    trainer = trainer_of()
    for name in names:
        for kind, damage in DAMAGE.items():
            shutil.rmtree(folder)
            shutil.copytree(saved, folder)
            damage(folder / "step_000002" / name)
            assert checkpoints.restore(trainer) == (1, {"at": 1}), (name, kind)
            assert_same(memory(trainer), first)
            lines = capfd.readouterr().err.splitlines()
            assert len(lines) == 1 and "step_000002 is damaged" in lines[0] and "from step 1" in lines[0], (
                lines
            )
            assert name in lines[0], (name, kind, lines)
            assert sorted(path.name for path in folder.iterdir()) == ["damaged_step_000002", "step_000001"]


def test_what_is_wrong_is_said_exactly(two, trainer_of) -> None:
    checkpoints, folder, _ = two
    shards = folder / "step_000001/__0_0.distcp", folder / "step_000002/__0_0.distcp"
    size = shards[0].stat().st_size
    shards[0].write_bytes(shards[0].read_bytes()[:512])
    flip(0.5)(shards[1])
    (folder / "step_000002/common.pt").unlink()
    for _ in range(2):  # nothing is set aside where nothing can take its place
        with pytest.raises(UserError) as raised:
            checkpoints.restore(trainer_of())
        assert f"step_000001: __0_0.distcp is 512 bytes instead of {size}" in str(raised.value)
        assert "step_000002: __0_0.distcp has other bytes than were written, and 1 more" in str(raised.value)
        assert "no checkpoint is intact" in str(raised.value) and "\n" not in str(raised.value)


def test_a_damaged_one_is_written_anew_when_its_step_comes_again(two, trainer_of, train: Train) -> None:
    checkpoints, folder, _ = two
    (folder / "step_000002/manifest.json").unlink()
    trainer = trainer_of()
    assert checkpoints.restore(trainer)[0] == 1
    train(trainer, 1)
    expected = memory(trainer)
    checkpoints.save(trainer, 2, {"at": "again"})
    assert checkpoints.restore(trainer) == (2, {"at": "again"})
    assert_same(memory(trainer), expected)


def test_another_model_is_refused(two, trainer_of, tmp_path: Path) -> None:
    checkpoints, _, _ = two
    shape = trainer_of().model.architecture
    for other, problem in (
        (replace(shape, ffn=shape.ffn * 2), f"is ({shape.ffn * 2}, 32) instead of ({shape.ffn * 4}, 32)"),
        (replace(shape, layers=shape.layers + 1), f"decoder.layers.{shape.layers}."),
        (replace(shape, layers=shape.layers - 1), "is not in the model"),
        (replace(shape, tied=not shape.tied), "output_layer.weight"),
    ):
        with pytest.raises(UserError, match="is of another model") as raised:
            checkpoints.restore(Trainer(build_model(other), Adam(lr=1e-3)))
        assert problem in str(raised.value) and "step_000002" in str(raised.value)


def test_the_manifest_can_be_checked_by_hand(two) -> None:
    _, folder, _ = two
    done = subprocess.run(
        ["sha256sum", "-c", "manifest.sha256"], cwd=folder / "step_000002", capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "manifest.json: OK\n"
    manifest = json.loads((folder / "step_000002/manifest.json").read_text())
    assert (manifest["step"], manifest["state"], manifest["optimizer_steps"]) == (2, {"at": 2}, 2)


def test_training_draws_from_no_random_stream(trainer_of, train: Train, tmp_path: Path) -> None:
    trainer = trainer_of()
    train(trainer, 1)

    def states() -> list[bytes]:
        name, keys, *rest = np.random.get_state()
        tracked = get_cuda_rng_tracker().get_states()
        return [
            torch.get_rng_state().numpy().tobytes(),
            *(state.cpu().numpy().tobytes() for _, state in sorted(tracked.items())),
            repr((name, keys.tolist(), rest)).encode(),
            repr(random.getstate()).encode(),
        ]

    before = states()
    assert len(before) > 3  # Megatron has streams of its own
    train(trainer, 2)
    assert states() == before
    torch.rand(1)
    assert states() != before
