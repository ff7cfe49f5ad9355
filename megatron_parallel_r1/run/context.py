"""The run context: folder, tokenizer, model configuration, and the weights that each stage starts from."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
from megatron_parallel_r1.config.data import DataSet, DistilledTraces, FolderTokenizer
from megatron_parallel_r1.config.recipe import TRACES, Recipe, is_finished
from megatron_parallel_r1.config.stages import RlStage, SftStage, Stage, TrainingStage
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.prompts import encode_prompt
from megatron_parallel_r1.data.schemas import CUSTOM, Columns
from megatron_parallel_r1.data.tokenizers import open_tokenizer
from megatron_parallel_r1.distributed.parallel_config import check_native_split, check_parallel
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.gpt import Model, build_model
from megatron_parallel_r1.model.layers import check_balance, check_fp8, check_layers
from megatron_parallel_r1.model.weights import load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.native.tensor_parallel import TensorParallelGroup
from megatron_parallel_r1.run.datasets import load_tokenizer
from megatron_parallel_r1.run.exporter import Exporter
from megatron_parallel_r1.run.folder import has_checkpoint
from megatron_parallel_r1.thought.format_settings import format_of
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.tokenizer import add_tags, eos_ids, spread_new_embeddings, tag_subwords
from megatron_parallel_r1.train.trainer import Adam, Trainer
from megatron_parallel_r1.utils.seeding import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True)
class RunContext:
    """State that all stages of a run share.

    Attributes:
        folder: the run folder.
        shape: the model configuration; its vocabulary is at least as large as the tokenizer's.
        new_ids: ids of tags that the tokenizer of `model.path` lacks; their embeddings are initialized anew.
        resumes: whether what the folder holds is kept when the run begins.
        exporter: the run's metrics for Prometheus.
    """

    recipe: Recipe
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    tags: Tags
    shape: ModelConfig
    new_ids: tuple[int, ...]
    resumes: bool
    exporter: Exporter

    @classmethod
    def set_up(cls, recipe: Recipe, folder: Path, resume: bool) -> RunContext:
        """Loads the tokenizer and the model configuration and checks that they match; writes nothing.

        Args:
            resume: load the tokenizer from the run folder, whose contents are kept.

        Raises:
            UserError: the model or the tokenizer cannot be read, or they do not match.
        """
        format = format_of(recipe.thinking.format)
        saved = open_tokenizer(folder / "tokenizer") if resume else None
        untagged = load_tokenizer(recipe) if recipe.model.path or saved is None else saved
        known = _known_tokens(recipe, untagged) if untagged is not saved else {}
        tokenizer = saved or untagged
        try:
            ends = eos_ids(base) if (base := _base(recipe)) else []
            find_tags = Tags.of if resume else add_tags
            tags = find_tags(tokenizer, ends, format)
        except ValueError as error:
            raise UserError(f"tokenizer: {error}; use another tokenizer") from None
        vocabulary = tokenizer.get_vocab()
        new_ids = tuple(vocabulary[text] for text in format.tags if known.get(text) != vocabulary[text])
        rows = max(vocabulary.values()) + 1
        if beyond := [token for token in ends if token >= rows]:
            raise UserError(f"{base}: eos_token_id {beyond[0]} is beyond the tokenizer's {rows} tokens")
        if recipe.model.shape is not None:
            shape = recipe.model.shape.config(rows)
        else:
            assert recipe.model.folder is not None, "a recipe has a shape or a path"
            shape, _ = load_hf_folder(recipe.model.folder)
            shape = replace(shape, vocab=max(shape.vocab, rows))
        return cls(recipe, folder, tokenizer, tags, shape, new_ids, resume, Exporter.of(recipe))

    def was_finished(self, stage: str) -> bool:
        """Returns whether the run that this one resumes has finished the stage."""
        return self.resumes and is_finished(self.stage_folder(stage))

    def check_starts(self, names: Collection[str]) -> None:
        """Checks that the stages that each stage in `names` needs are finished or in `names` too.

        Raises:
            UserError: one is neither, or its optimizer is to be carried over and was deleted.
        """
        for stage in self.recipe.stages:
            if stage.name not in names:
                continue
            for before in self.recipe.needs_of(stage):
                if before not in names and not self._is_done(before):
                    needs = "starts from" if before == self.recipe.start_of(stage) else "trains on traces of"
                    raise UserError(f"stage {stage.name} {needs} {before}, which is not done; run that first")
            if isinstance(stage, TrainingStage) and stage.carry_optimizer:
                self._check_optimizer(stage, self.recipe.start_of(stage) or "")

    def _is_done(self, stage: str) -> bool:
        start = self.start_folder(stage)
        return self.was_finished(stage) or (start != self.stage_folder(stage) and is_finished(start))

    def _check_optimizer(self, stage: TrainingStage, before: str) -> None:
        begun = self.was_finished(stage.name) or has_checkpoint(self.folder, stage.name)
        kept = has_checkpoint(self.start_folder(before).parent, before)
        if self._is_done(before) and not (begun or kept):
            raise UserError(
                f"stage {stage.name}: carry_optimizer, but the checkpoints of {before} were deleted at "
                "its end; start with a fresh optimizer, or choose another name to train both"
            )

    def check_split(self, names: Collection[str], world: int) -> None:
        """Checks that `world` ranks can run the stages under the recipe's parallel layout.

        Raises:
            UserError: a size is not divisible, or the native engine cannot decode under that layout.
        """
        parallel = self.recipe.parallel
        check_parallel(self.shape, parallel, world, self.recipe.max_tokens_per_micro_batch)
        layers = self.recipe.model.made_of
        check_layers(layers, self.shape.head_dim, self.dtype)
        check_balance(layers, self.shape)
        check_fp8(layers, self.shape, parallel.tensor, parallel.pipeline)
        if self.recipe.max_tokens_per_micro_batch % (multiple := parallel.row_multiple * layers.row_multiple):
            raise UserError(f"max_tokens_per_micro_batch: FP8 rows need a multiple of {multiple} here")
        if self.recipe.rollout.engine != "native":
            return
        if any(stage.samples_traces for stage in self.recipe.stages if stage.name in names):
            check_native_split(parallel.pipeline, parallel.context)
        ahead = [s.name for s in self.recipe.stages if isinstance(s, RlStage) and s.max_off_policy_steps]
        if ahead and parallel.tensor > 1 and torch.cuda.is_available():
            # Two threads would launch collectives of two groups on one GPU, in no common order of the ranks.
            raise UserError(
                f"stage {ahead[0]}: max_off_policy_steps with the native engine over tensor "
                f"{parallel.tensor} can deadlock on GPUs; set parallel.tensor to 1 or "
                "max_off_policy_steps to 0"
            )

    @property
    def base(self) -> Path | None:
        """The model that the run begins as, if its special tokens are those of the run's tokenizer."""
        return _base(self.recipe)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.recipe.model.dtype)

    def stage_folder(self, name: str) -> Path:
        return self.folder / name

    def start_folder(self, name: str) -> Path:
        """The folder of a stage that another one starts from."""
        return self.recipe.start_folder(self.folder, name)

    def seed_of(self, *words: str) -> int:
        """Derives the run's seed for one purpose, such as `(stage, "rollout")`."""
        return derive_seed(self.recipe.seed, *words)

    def with_traces(self, stage: SftStage) -> SftStage:
        """Returns the stage with the file that a `distill` stage wrote in place of that stage's name."""
        if not isinstance(stage.data, DistilledTraces):
            return stage
        file = self.start_folder(stage.data.stage) / TRACES
        columns = Columns(prompt="question", answer="answer", response="response")
        # Several traces of one problem are wanted: `balance.per_problem`.
        data = DataSet(source="dataset", name=CUSTOM, path=file, columns=columns, drop_repeats=False)
        return stage.model_copy(update={"data": data})

    def trainer(self, stage: TrainingStage) -> Trainer:
        """Builds a trainer with the stage's starting weights and a fresh optimizer."""
        optimizer = stage.optimizer
        adam = Adam(
            optimizer.lr,
            optimizer.betas,
            optimizer.eps,
            optimizer.weight_decay,
            optimizer.clip_grad_norm,
            self.recipe.parallel.sharded_optimizer,
            self.recipe.parallel.overlap_gradients,
        )
        return Trainer(self.model(stage), adam, self.recipe.thinking_of(stage).temperature or 1.0)

    def model(self, stage: Stage, folder: Path | None = None) -> Model:
        """Builds a model with the stage's starting weights, or with those of a Hugging Face folder."""
        model = build_model(self.shape, self.dtype, self.recipe.parallel, self.recipe.model.made_of)
        load_hf_tensors(model, load_hf_folder(folder)[1] if folder else self._start_tensors(stage))
        return model

    def finished_model(self, stage: Stage) -> Model:
        """Loads the model that a finished stage saved."""
        return self.model(stage, self.stage_folder(stage.name) / "model")

    def reference_folder(self, stage: RlStage, step: int) -> Path:
        """The folder of the reference policy that was copied after `step`; deleted when the stage ends."""
        return self.stage_folder(stage.name) / "reference" / f"step_{step:06d}"

    def prompt_tokens(self, problem: Problem) -> int:
        """Number of tokens of a problem's prompt."""
        return len(encode_prompt(self.tokenizer, self.recipe.prompt_template, problem))

    def _start_tensors(self, stage: Stage) -> Iterable[tuple[str, Tensor]]:
        before = self.recipe.start_of(stage)
        if before is not None:
            return load_hf_folder(self.start_folder(before) / "model")[1]
        if self.recipe.model.shape is not None:
            return random_hf_tensors(self.shape, self.recipe.seed, self.recipe.model.shape.init_std)
        assert self.recipe.model.folder is not None, "a recipe has a shape or a path"
        released = load_hf_folder(self.recipe.model.folder)[1]
        return ((name, self._with_tags(name, tensor)) for name, tensor in released)

    def _with_tags(self, name: str, tensor: Tensor) -> Tensor:
        """Adds distinct embedding rows for the tags.

        Tags that the tokenizer has but that were never trained can have equal rows; these are replaced too.
        """
        if name not in EMBEDDINGS:
            return tensor
        rows = tensor.shape[0]
        fresh = {*self.new_ids, *range(rows, self.shape.vocab)}
        trained = tensor[[id for id in self.tags.ids if id < rows]]
        if len(trained.unique(dim=0)) < len(trained):
            fresh.update(self.tags.ids)
        grown_VE = torch.cat([tensor, tensor.new_zeros(self.shape.vocab - rows, tensor.shape[1])])
        own = self.recipe.model.new_rows == "subwords"
        subwords = tag_subwords(self.tokenizer, self.tags.format) if own else None
        spread_new_embeddings(grown_VE, sorted(fresh), self.recipe.seed, subwords)
        return grown_VE


def _known_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids of the tokens that the model has rows for.

    They are those of the tokenizer in the model's folder, if there is one and the recipe names another: a
    release keeps its trained tags under any tokenizer that gives them the same ids.
    """
    path, settings = recipe.model.folder, recipe.tokenizer
    if path is None or (isinstance(settings, FolderTokenizer) and settings.folder in (None, path)):
        return tokenizer.get_vocab()
    try:
        return open_tokenizer(path).get_vocab()
    except UserError:
        return tokenizer.get_vocab()


def _base(recipe: Recipe) -> Path | None:
    return recipe.model.folder if isinstance(recipe.tokenizer, FolderTokenizer) else None


def native_engine(
    shape: ModelConfig, group: dist.ProcessGroup | None = None, compiled: bool = False
) -> NativeEngine:
    """Creates a native engine for a model configuration, without weights, over the tensor-parallel group.

    Args:
        group: another process group of the same ranks, for an engine in a second thread.
        compiled: run the layers through torch.compile (`NativeEngine`).
    """
    team = TensorParallelGroup.of(group or parallel_state.get_tensor_model_parallel_group())
    return NativeEngine(shape, team, compiled=compiled)
