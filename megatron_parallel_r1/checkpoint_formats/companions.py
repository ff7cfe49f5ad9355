"""The small files of a Hugging Face folder: tokenizer, generation settings, licence.

Runs keep those of the model that they began as; conversions copy all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_parallel_r1.thought.tokenizer import GENERATION, eos_ids, read_fields, read_generation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "README.md", "additional_chat_templates/*")
_LEGAL = ("license", "licence", "notice", "use_policy", "copying")


def companions(folder: Path) -> list[Path]:
    """Returns the small files of a model, in order."""
    found = {file for pattern in _COPIED for file in folder.glob(pattern) if file.is_file()}
    return sorted(found | {*legal_files(folder)})


def legal_files(folder: Path) -> list[Path]:
    """Returns the licence of a model and what belongs to it."""
    return [
        file for file in sorted(folder.iterdir()) if file.is_file() and file.name.lower().startswith(_LEGAL)
    ]


def generation_of(
    tokenizer: PreTrainedTokenizerBase, base: Path | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the generation settings of a model, and the special tokens of its config.json.

    Args:
        tokenizer: its EOS and padding are used.
        base: the model whose settings are kept, with all its EOS tokens; None: there is none.

    Raises:
        UserError: a file of `base` is damaged.
    """
    if base is None:
        special: dict[str, Any] = {
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        return {"do_sample": True, **special}, special
    kept = read_generation(base)
    known = {**read_fields(base / "config.json"), **kept}
    ids = eos_ids(base)
    if tokenizer.eos_token_id not in ids:
        ids = [*ids, tokenizer.eos_token_id]
    pad = tokenizer.pad_token_id
    special = {
        "eos_token_id": ids if len(ids) > 1 else ids[0],
        "pad_token_id": known.get("pad_token_id") if pad is None else pad,
    }
    if "bos_token_id" in known:
        special["bos_token_id"] = known["bos_token_id"]
    stored = kept if (base / GENERATION).is_file() else {"do_sample": True}
    return {**stored, **special}, special
