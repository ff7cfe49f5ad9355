"""The page: one file that loads nothing; its content policy allows its own script and style alone."""

from __future__ import annotations

import base64
import hashlib
import html
from pathlib import Path

from megatron_parallel_r1.rollout.settings import Thinking

FOLDER = Path(__file__).parent / "templates"


def build_page(name: str, thinking: Thinking, needs_key: bool) -> tuple[str, str]:
    """The page and its content policy, a header's value.

    What a model writes gets into the page as text nodes, by its script; what stands here is escaped.
    """
    style, script = (_read(file) for file in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; connect-src 'self'; "
        "img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    fills = {
        "@paths@": str(thinking.paths),
        "@key@": "" if needs_key else " hidden",
        "@style@": style,
        "@script@": script,
        "@name@": html.escape(name),
    }
    page = _read("page.html")
    for mark, text in fills.items():
        page = page.replace(mark, text)
    return page, policy


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{digest}"
