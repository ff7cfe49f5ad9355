"""The kernel that SGLang's rotary embedding imports on a CPU; its own torch code is what runs."""

from typing import NoReturn


def rotary_embedding(*_: object) -> NoReturn:
    raise NotImplementedError("a stand-in that is only imported")
