"""Models by their names on the Hugging Face Hub: one command downloads, all others read the Hub's cache.

Nothing else downloads a model. Compute nodes often have no network, and a hundred ranks would ask at once.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_parallel_r1.errors import UserError, one_line

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# Weights of other formats, which some repositories have beside safetensors.
_OTHER_WEIGHTS = ["original/*", "consolidated*", "*.gguf", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack"]
# What a folder that another tool fetched must have, too.
_NEEDED = ["config.json", "*.safetensors"]


def is_hub_name(path: Path | str) -> bool:
    """Returns whether this may be `owner/name` or `owner/name@revision`, and no folder is there."""
    return bool(_NAME.fullmatch(str(path))) and not Path(path).exists()


def local_folder(path: Path | str) -> Path:
    """Returns the folder of a downloaded model if `path` is its name on the Hub, else `path` itself."""
    if not is_hub_name(path):
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, revision = _parts(path)
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=_NEEDED,
            ignore_patterns=_OTHER_WEIGHTS,
            local_files_only=True,
        )
    except (LocalEntryNotFoundError, ValueError):
        return Path(path)
    return Path(folder)


def missing_folder(path: Path | str) -> str:
    """Returns what to do about a folder that is not there, for an error message."""
    if is_hub_name(path):
        return f"run `parallel-r1 download {path}`, or give the folder of a Hugging Face model"
    return "give the folder of a Hugging Face model on this machine"


def download(path: str) -> Path:
    """Downloads a model, or what an interrupted download left, and returns its folder in the Hub's cache.

    Args:
        path: `owner/name`, or `owner/name@revision` for a branch, tag or commit.

    Raises:
        UserError: it is not such a name; or the Hub is out of reach, refuses, or has no such model with
            safetensors.
    """
    if not _NAME.fullmatch(path):
        raise UserError(f"{path}: not a name on the Hub; give owner/name, such as Qwen/Qwen3-4B-Base")
    from huggingface_hub import snapshot_download

    name, revision = _parts(path)
    try:
        folder = Path(snapshot_download(name, revision=revision, ignore_patterns=_OTHER_WEIGHTS))
    except Exception as error:  # the library, its HTTP client and the disk raise many types
        raise UserError(
            f"{path}: cannot download it from the Hugging Face Hub ({one_line(error)}); check name and "
            "network, set HF_TOKEN for a gated model, or copy the model's folder to this machine"
        ) from None
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{path}: no safetensors there; choose a revision that has them")
    return folder


def _parts(path: Path | str) -> tuple[str, str | None]:
    name, _, revision = str(path).partition("@")
    return name, revision or None
