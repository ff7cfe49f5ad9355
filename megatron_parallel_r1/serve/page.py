"""The web page: one file without external resources; its content policy allows only its own code."""

from __future__ import annotations

import base64
import hashlib
import html
from pathlib import Path

from megatron_parallel_r1.rollout.settings import Thinking

FOLDER = Path(__file__).parent / "templates"


def build_page(name: str, thinking: Thinking, needs_key: bool) -> tuple[str, str]:
    """Builds the page and the value of its Content-Security-Policy header.

    The script inserts generated text as text nodes; values inserted here are escaped.
    """
    style, script = (_read(file) for file in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; connect-src 'self'; "
        "img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    values = {
        "@paths@": str(thinking.paths),
        "@key@": "" if needs_key else " hidden",
        "@style@": style,
        "@script@": script,
        "@name@": html.escape(name),
    }
    page = _read("page.html")
    for placeholder, text in values.items():
        page = page.replace(placeholder, text)
    return page, policy


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{digest}"
