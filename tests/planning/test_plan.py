"""A plan's figures against hand-computed ones, and its bounds against what the parts of a run really do."""

from __future__ import annotations

import random
from math import prod
from pathlib import Path

import numpy as np
import pytest
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from typer.testing import CliRunner

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import EMBEDDING, HEAD, weight_table
from megatron_parallel_r1.cli import app
from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.transformer import transformer_config
from megatron_parallel_r1.planning.memory import pipeline_parts
from megatron_parallel_r1.planning.plan import GIB, Plan, plan
from megatron_parallel_r1.planning.plan_text import plan_text
from megatron_parallel_r1.planning.published import PUBLISHED, published_config
from megatron_parallel_r1.planning.rollouts import LengthLimits, longest_branches, longest_row
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.thought.layout import Row, lay_out
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.train.micro_batch import BatchPartition, partition_rows
from tests.reference.traces import TAGS, random_trace

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CURRICULUM = RECIPES / "qwen3_4b/curriculum.yaml"
# Those with servers are in test_flagships.py.
SERVED = ("one_node", "servers")
NATIVE = [path for path in sorted(RECIPES.glob("qwen3_4b/*.yaml")) if path.stem not in SERVED]
MINI = Path(__file__).resolve().parents[1] / "curriculum/mini.yaml"
LAYOUTS = [
    ParallelConfig(),
    ParallelConfig(tensor=2, pipeline=3),
    ParallelConfig(pipeline=3, virtual=2),
    ParallelConfig(pipeline=2, virtual=6),
    ParallelConfig(pipeline=4, first_stage_layers=2, last_stage_layers=4),
    ParallelConfig(tensor=2, pipeline=2, last_stage_layers=5),
]


def planned(path: Path, *overrides: str, world: int = 1, longest: LengthLimits | None = None) -> Plan:
    return plan(read_recipe(path, overrides), world, longest=longest)


def test_published_shapes_have_the_published_number_of_weights() -> None:
    counts = {
        name: sum(prod(size) for weight in weight_table(shape) for _, size in weight.parts)
        for name, shape in PUBLISHED.items()
    }
    published = {
        "Qwen3-0.6B": 596_049_920,
        "Qwen3-1.7B": 1_720_574_976,
        "Qwen3-4B": 4_022_468_096,
        "Qwen3-8B": 8_190_735_360,
        "Qwen3-14B": 14_768_307_200,
        "Qwen3-30B-A3B": 30_532_122_624,
    }
    bases = {f"{name}-Base": count for name, count in published.items()}
    large = {"Qwen3-32B": 32_762_123_264, "Qwen3-235B-A22B": 235_093_634_560}
    small = dict.fromkeys(["SmolLM2-135M", "SmolLM2-135M-Instruct"], 134_515_008)
    assert counts == published | bases | large | small


def test_a_folder_that_is_there_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-4B-Base"
    assert published_config(folder) == (PUBLISHED["Qwen3-4B-Base"], False)
    folder.mkdir()
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        published_config(folder)
    for text, message in (
        ('{"model_type": "gpt2"}', "model_type is 'gpt2'; supported are 'qwen3'"),
        ('{"model_type": "llama"}', "'hidden_size' is missing"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            published_config(folder)


@pytest.mark.parametrize("parallel", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_has_its_place(parallel: ParallelConfig, tied: bool) -> None:
    shape = ModelConfig(hidden=16, layers=12, heads=4, kv_heads=2, head_dim=8, ffn=32, vocab=101, tied=tied)
    held = pipeline_parts(shape, parallel)
    config = transformer_config(shape, parallel=parallel)
    for part in held:
        for turn, chunk in enumerate(part.chunks):
            stage = turn if parallel.virtual > 1 else None
            assert chunk.start == get_transformer_layer_offset(config, stage, part.rank)
    names = [name for part in held for name, _ in part.weights]
    copies = [EMBEDDING] if tied and parallel.pipeline > 1 else []
    assert sorted(names) == sorted([weight.name for weight in weight_table(shape)] + copies)
    assert (HEAD in dict(held[-1].weights)) == (not tied)
    # 101 tokens filled up to 102 for two ranks.
    assert dict(held[0].weights)[EMBEDDING] == (101 if parallel.tensor == 1 else 51, 16)


def test_the_curriculum_by_hand() -> None:
    planned_run = planned(CURRICULUM, world=64)
    assert (planned_run.data, planned_run.shape.layers, len(planned_run.parts)) == (32, 36, 1)
    sft, easy, s1, s2 = planned_run.stages
    assert [stage.start for stage in planned_run.stages] == [None, "sft", "rl_easy", "rl_easy"]
    # Two rows of 4,096 fit in 8,192; each of 32 copies has 4.
    assert (sft.rows, sft.trained, sft.micro_batches, sft.row) == (128, 128 * 4096, 2, 8192)
    # 256 x 8 traces of 3,000 drawn tokens; a prompt of 2,000; branches as long as the response at most.
    for stage in (easy, s1, s2):
        assert (stage.rows, stage.sampled, stage.trained) == (2048, 2048 * 3000, 2048 * 8000)
        # Two updates of 1,024 rows, 32 for each copy, each a row of its own.
        assert (stage.updates, stage.micro_batches, stage.row) == (2, 32, 8192)
        # 8 prompts of a copy, and all of its 64 traces.
        assert stage.slots == 8 * 2000 + 64 * 6000
    memory = s2.memories[0]
    # Half of the weights are on each tensor rank, but norms (2 x 36 + 1 of 2,560, 2 x 36 of 128) on both.
    norms = 73 * 2560 + 72 * 128
    elements = (4_022_468_096 - norms) // 2 + norms
    assert memory.weights == memory.engine == 2 * elements
    assert memory.gradients == 4 * elements
    assert memory.optimizer == 12 * -(-elements // 32)
    # 400,000 slots need 4,096 doubled 7 times; 36 layers, key and value, 4 heads of 128, bfloat16.
    assert memory.cache == 2**19 * 36 * 2 * 4 * 128 * 2
    # Half a row on each rank of norm input, its scale, and output; of the whole row the projection of 16
    # query and 4 key and value heads, a copy of its queries, cosines, sines, the rotated query and key, the
    # output, and scales of the heads' norms and attention's sums. One MLP at a time is made again.
    norm = 4096 * ((2 * 2560 + 4) + 2 * 2560)
    heads = 8192 * (2 * (2 * 2048 + 2 * 512 + 4 * 128 + 2 * 2048 + 512) + 4 * (2 * 16 + 4))
    final = 4096 * (2 * 2560 + 4) + 8192 * 2 * 2560
    assert memory.activations == 36 * (2 * norm + heads) + 8192 * 2 * 5 * 4864 + final
    assert memory.reference == 0


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: path.stem)
@pytest.mark.parametrize("world", [8, 64])
def test_the_recipes_fit_their_gpus(path: Path, world: int) -> None:
    planned_run = planned(path, world=world)
    assert all("is not on this machine" in note for note in planned_run.notes), planned_run.notes
    for stage in planned_run.stages:
        assert max(memory.total for memory in stage.memories) < 80 * GIB
        assert stage.evaluation is not None and stage.evaluation.total < 80 * GIB


def test_what_a_recipe_bounds_is_not_assumed() -> None:
    def plan_and_notes(*overrides: str) -> tuple[Plan, list[str]]:
        planned_run = planned(CURRICULUM, *overrides, world=8, longest=LengthLimits(1500, 3000))
        return planned_run, [note for note in planned_run.notes if "assumed, since" in note]

    bounded, none = plan_and_notes("max_prompt_tokens=1000", "max_example_tokens=2000")
    assert none == [] and bounded.stages[0].trained == 128 * 2000
    loose, (note,) = plan_and_notes("max_prompt_tokens=null")
    assert "prompts of up to 1,500 tokens and SFT rows of up to 3,000 tokens, or" in note
    assert loose.stages[0].trained == 128 * 3000
    assert loose.stages[1].trained == bounded.stages[1].trained + 256 * 8 * 500


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_has_a_plan_in_words(path: Path) -> None:
    planned_run = planned(path, world=max(2, read_recipe(path, ()).parallel.smallest_world))
    text = plan_text(planned_run)
    assert all(f"{stage.stage.name}: {stage.stage.kind}" in text for stage in planned_run.stages)


def test_without_a_number_of_gpus_it_is_for_one_copy_of_the_model() -> None:
    shown = CliRunner().invoke(app, ["plan", str(CURRICULUM)])
    assert shown.exit_code == 0 and "2 processes = tensor 2" in shown.output


def test_the_plan_in_words() -> None:
    text = plan_text(planned(CURRICULUM, world=64))
    for line in (
        "4,022,468,096 weights in bfloat16",
        "64 processes = tensor 2 x pipeline 1 x context 1 x data 32",
        "36 x  decoder.layers.*.mlp.linear_fc1.weight              [9728, 2560]",
        "75,968 of 151,936 rows of the vocabulary",
        "rl_s2: rl, 300 steps, mode replay, from rl_easy",
        "reward: accuracy + 0.2 x parallel_bonus in the last 2 of every 10 steps",
        "ppo ratio by token in 0.8..1.28, no KL",
        "rises to 1e-05 over 10 steps, then falls linearly to 1e-06",
        "2 updates x 32 micro-batches of at most 8,192 tokens on each of 32 copies",
        "note: Qwen/Qwen3-4B-Base is not on this machine",
    ):
        assert line in text, text


def test_the_scaffold_in_words() -> None:
    text = plan_text(planned(RECIPES / "qwen3_4b/scaffold.yaml", world=8))
    assert "rl_accuracy: rl, 200 steps, mode isolated, from rl_scaffold with its optimizer" in text
    until = "stages.rl_scaffold.early_stopping={metric: accuracy}"
    text = plan_text(planned(RECIPES / "qwen3_4b/scaffold.yaml", until, world=8))
    assert (
        "rl_scaffold: rl, 200 steps at most, until accuracy gets no better, mode isolated, from sft" in text
    )


def test_a_pipeline_in_words() -> None:
    layout = "parallel={tensor: 2, pipeline: 2, virtual: 2, context: 2, sequence: true}"
    planned_run = planned(CURRICULUM, layout, world=16)
    assert planned_run.data == 2 and planned_run.stages[1].slots is None
    # 1,024 rows for 2 copies, and an even number since two interleaved processes take turns.
    assert planned_run.stages[1].micro_batches == 512
    text = plan_text(planned_run)
    assert "pipeline rank 0: layers 0..8, 18..26" in text
    assert "a run would end with: native engine: pipeline 2 and context 2 is not supported" in text


def test_what_does_not_fit_is_said() -> None:
    (note,) = (
        note
        for note in planned(CURRICULUM, "stages.rl_s2.max_concurrent_rollouts=512", world=8).notes
        if "GiB" in note
    )
    # 64 prompts and 512 traces: 3.2 million slots, for which the cache doubles to 2^22 of 72 KiB: 288 GiB.
    assert (
        "stage rl_s2: about 319 GiB are needed, a GPU has 80; lower its max_concurrent_rollouts (512)" in note
    )
    (long,) = (
        note
        for note in planned(CURRICULUM, "max_tokens_per_micro_batch=4096", world=8).notes
        if "rl_s1" in note
    )
    assert (
        "a row may have 8,000 tokens; one longer than max_tokens_per_micro_batch (4,096) is a micro-batch"
        in long
    )
    with_kl = planned(CURRICULUM, "stages.rl_s1.objective={kl: k3}", world=64)
    memory = with_kl.stages[2].memories[0]
    assert memory.reference == memory.weights and "KL k3 in the loss" in plan_text(with_kl)
    (idle, rl) = (note for note in planned(MINI, world=9).notes if "idle" in note)
    assert "cold_start: 8 rows an update leave some of 9 replicas idle" in idle
    assert "rl: 6 rows an update leave some of 9 replicas idle" in rl


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (("rollout.servers=4",), 4, "8 GPUs: 4 of processes, 4 of servers, which are on the first node"),
        (("rollout.servers=4", "rollout.tensor=2"), 2, "would end with: rollout.servers: 4 servers of"),
        (
            ("rollout.servers=8", "rollout.colocated=true", "rollout.sync.transport=tensor"),
            16,
            "the 8 servers of each node share the GPUs of its processes",
        ),
        (("rollout.servers=8", "rollout.colocated=true"), 8, "would end with: rollout.colocated: NCCL takes"),
    ],
)
def test_the_gpus_of_servers_are_counted(overrides: tuple[str, ...], world: int, message: str) -> None:
    notes = planned(CURRICULUM, "rollout.engine=sglang", *overrides, world=world).notes
    assert any(message in note for note in notes), notes


def test_a_layout_fits_colocated_servers_or_wants_them_apart() -> None:
    def notes(*overrides: str, world: int) -> list[str]:
        words = ("rollout.engine=sglang", "rollout.servers=8", "rollout.colocated=true")
        found = planned(CURRICULUM, *words, "rollout.sync.transport=tensor", *overrides, world=world)
        return [note for note in found.notes if "while servers draw" in note]

    fits = notes("parallel.tensor=2", "parallel.sharded_optimizer=true", world=16)
    assert fits and all("colocated servers fit; of 80 GiB" in note for note in fits)
    # Adam whole on each GPU: 4B weights, gradients and optimizer are 18 bytes a weight.
    whole = ("parallel.tensor=1", "parallel.sequence=false", "parallel.sharded_optimizer=false")
    apart = notes(*whole, world=8)
    assert apart and all("wants servers apart" in note for note in apart)


def test_dynamic_sampling_draws_more() -> None:
    once, more = (
        planned(MINI, *overrides).stages[1]
        for overrides in ((), ("stages.rl.dynamic_sampling={max_rounds: 3, oversampling: 1.5}",))
    )
    # 3 problems, then 3 rounds of 4.5, rounded up; what is trained stays.
    assert (once.sampled, more.sampled) == (3 * 4 * 80, 3 * 5 * 4 * 80)
    assert once.trained == more.trained and more.slots > once.slots


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (("parallel.tensor=3",), 3, "tensor 3 does not divide the model's heads 32; set tensor to 2"),
        (("parallel.pipeline=5",), 10, "36 layers cannot be cut into pipeline 5 .* set pipeline to 4"),
        ((), 3, "= 2 does not divide the 3 processes; start a multiple of 2"),
        (("max_tokens_per_micro_batch=8191",), 2, "max_tokens_per_micro_batch: 8191 is no multiple of 2"),
        (("model.path=/nowhere/at/all",), 2, "/nowhere/at/all: no config.json; .* Qwen3-4B-Base"),
        (
            ("model={shape: {hidden: 8, layers: 1, heads: 2, kv_heads: 2, head_dim: 4, ffn: 8}}",),
            2,
            "give path",
        ),
    ],
)
def test_what_cannot_be_is_one_line(overrides: tuple[str, ...], world: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        planned(CURRICULUM, *overrides, world=world)
    assert len(str(refused.value).splitlines()) == 1


def row_of(length: int) -> Row:
    nothing_DL = np.zeros((0, length), np.int32)
    index_L = np.arange(length, dtype=np.int32)
    return Row(index_L, index_L, nothing_DL, nothing_DL, np.where(index_L, index_L, -1).astype(np.int32))


@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize(("world", "capacity"), [(1, 512), (2, 512), (2, 176), (6, 400), (16, 100)])
def test_micro_batches_are_those_that_rows_of_full_length_make(
    world: int, capacity: int, virtual: int
) -> None:
    pipeline = 2 if virtual > 1 else 1
    layout = f"parallel={{pipeline: {pipeline}, virtual: {virtual}}}"
    # Four layers for two interleaved processes.
    words = (layout, f"max_tokens_per_micro_batch={capacity}", "model.shape.layers=4")
    planned_run = planned(MINI, *words, world=world * pipeline, longest=LengthLimits(prompt=8, example=80))
    for stage, rows, length in zip(planned_run.stages, (8, 8), (80, 88), strict=True):
        partition = BatchPartition(data_size=world, rounds=pipeline if virtual > 1 else 1)
        packed = partition_rows([row_of(length)] * rows, capacity, partition)
        assert stage.micro_batches == len(packed)
        assert all(len(row) <= stage.row for row in packed)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("mode", ["isolated", "replay", "causal"])
def test_no_row_is_longer_than_its_bound(depth: int, mode: str) -> None:
    prompt = [20, 21]
    longest = 0.0
    for seed in range(300):
        paths = random.Random(seed).randint(2, 4)
        trace = random_trace(seed, depth=depth, most_paths=paths, most_text=3)
        tree = parse(trace, TAGS)
        blocks = len(tree.blocks)
        thinking = Thinking(
            mode=mode,
            paths=paths,
            max_blocks=max(blocks, 1),
            max_depth=depth,
            max_path_tokens=max(
                (p.stop - p.start - 1 for _, b in tree.all_blocks() for p in b.paths), default=1
            ),
            max_response_tokens=len(trace),
        )
        row = lay_out(prompt, trace, [index not in tree.forced() for index in range(len(trace))], tree, mode)
        bound = longest_row(thinking, len(prompt))
        assert len(row) <= bound
        longest = max(longest, len(row) / bound)
    # The bound is one that rows come near, where nothing is repeated they reach it.
    assert longest == 1 if mode != "replay" else longest > 0.6


def test_branches_by_hand() -> None:
    replay = Thinking(mode="replay", paths=3, max_blocks=2, max_path_tokens=10, max_response_tokens=100)
    # Two blocks repeat two paths of a tag, 10 tokens and a forced tag each; never more than the response.
    assert longest_branches(replay) == 48
    assert (
        longest_row(Thinking(mode="replay", paths=3, max_path_tokens=99, max_response_tokens=100), 5) == 205
    )
    assert longest_row(Thinking(mode="isolated", paths=3, max_response_tokens=100), 5) == 105
    # Only as many as three paths side by side fill a critical path of 20.
    assert longest_row(Thinking(paths=3, max_response_tokens=100, max_critical_tokens=20), 5) == 65
