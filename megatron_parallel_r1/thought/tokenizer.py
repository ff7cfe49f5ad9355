"""Adds a format's tags to a tokenizer and an embedding, and reads which tokens end a response.

Unused rows of a released base model can be identical; trained from there, a model hardly ever writes a
well-formed block. So each new row starts at the mean of the rows of the tag text's own subwords, or of all
trained rows, plus noise of its own.

Shapes: V vocabulary, D hidden size, N new rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.formats import PARALLEL_R1, ThinkingFormat
from megatron_parallel_r1.thought.tags import Tags

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

GENERATION = "generation_config.json"


def add_tags(
    tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int] = (), format: ThinkingFormat = PARALLEL_R1
) -> Tags:
    """Adds a format's tags as single, non-special tokens, which `decode` shows; returns their ids."""
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in format.tags])
    return Tags.of(tokenizer, eos_ids, format)


def tag_subwords(
    tokenizer: PreTrainedTokenizerBase, format: ThinkingFormat = PARALLEL_R1
) -> dict[int, list[int]]:
    """Returns the tokens of each tag's text, such as `</`, `Path`, `>`, by the tag's id; [] if unknown."""
    subwords = {}
    for text in format.tags:
        parts = re.findall(r"\w+|\W+", text)
        tokens = [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False)]
        subwords[tokenizer.get_vocab()[text]] = [t for t in tokens if t != tokenizer.unk_token_id]
    return subwords


def spread_new_embeddings(
    weight_VD: torch.Tensor,
    new_ids: Sequence[int],
    seed: int,
    subwords: Mapping[int, Sequence[int]] | None = None,
) -> None:
    """Sets the rows `new_ids` in place to a mean of other rows plus 0.1 std of independent noise.

    Args:
        subwords: the rows of each new row's mean; of all other rows where it has none.
    """
    import torch  # not with the module: recipes are read without it

    if not new_ids:
        return
    trained_V = torch.ones(weight_VD.shape[0], dtype=torch.bool)
    trained_V[list(new_ids)] = False
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        rows_VD = weight_VD[trained_V.to(weight_VD.device)].float()
        noise_ND = torch.randn(len(new_ids), weight_VD.shape[1], generator=generator)
        new_ND = rows_VD.mean(0) + 0.1 * rows_VD.std(0) * noise_ND.to(weight_VD.device)
        for row, new_id in enumerate(new_ids):
            if own := (subwords or {}).get(new_id):
                new_ND[row] += weight_VD[list(own)].float().mean(0) - rows_VD.mean(0)
        weight_VD[list(new_ids)] = new_ND.to(weight_VD.dtype)


def read_fields(file: Path) -> dict[str, Any]:
    """Reads a JSON object; {} where there is no file.

    Raises:
        UserError: the file is damaged.
    """
    if not file.is_file():
        return {}
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); copy it again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{file} is not a JSON object; copy it again")
    return fields


def read_generation(folder: Path) -> dict[str, Any]:
    """Returns the generation settings of a Hugging Face folder, as transformers finds them.

    They are in generation_config.json, or else the special tokens of config.json; {} without either.

    Raises:
        UserError: a file is damaged, or `eos_token_id` is no token id or list of them.
    """
    file = folder / GENERATION
    fields = read_fields(file)
    if not file.is_file():
        file = folder / "config.json"
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        fields = {name: value for name, value in read_fields(file).items() if name in names}
    ends = fields.get("eos_token_id")
    for token in ends if isinstance(ends, list) else [ends]:
        if token is not None and (type(token) is not int or token < 0):
            raise UserError(f"{file}: eos_token_id = {ends!r} is no token id; copy the file again")
    return fields


def eos_ids(folder: Path) -> list[int]:
    """Returns the tokens that end a response by the generation settings of a Hugging Face folder.

    Raises:
        UserError: as `read_generation`.
    """
    ends = read_generation(folder).get("eos_token_id")
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Saves a tokenizer's files.

    Raises:
        UserError: they could not be written; the library reports a full disk by an exception of no kind.
    """
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        raise UserError(
            f"a file could not be written: the tokenizer in {folder}: {error}; free space"
        ) from None
