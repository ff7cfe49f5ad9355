"""API keys: settings name where a key is, and never hold one."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_parallel_r1.errors import UserError


def read_key(variable: str | None, file: Path | None = None, where: str = "") -> str | None:
    """The key in an environment variable or a file; None if neither is named.

    Args:
        where: of the settings `key_variable` and `key_file`, for messages, such as `rollout.`.

    Raises:
        UserError: both are named, or there is no valid key.
    """
    if variable is not None and file is not None:
        raise UserError(f"{where}key_variable and {where}key_file both name a key; leave one out")
    if variable is not None:
        name, key = f"{where}key_variable: {variable}", os.environ.get(variable, "").strip()
        if not key:
            raise UserError(f"{name} is not set in the environment; set it to the key")
    elif file is not None:
        name = f"{where}key_file: {file}"
        try:
            key = file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name}: {getattr(error, 'strerror', None) or 'no text'}") from None
        if not key:
            raise UserError(f"{name} is empty; write the key into it")
    else:
        return None
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{name} holds no valid key; set it to printable ASCII")
    return key


def bearer(key: str | None) -> dict[str, str]:
    """The header that sends a key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def refusal(status: int, key: str | None) -> str:
    """What to do about an answer with this status; empty if it has nothing to do with a key."""
    if status != 401:
        return ""
    wants = "it wants an API key" if key is None else "it wants another API key"
    return f"{wants}; name it by rollout.key_variable or key_file (options --key-variable, --key-file)"
