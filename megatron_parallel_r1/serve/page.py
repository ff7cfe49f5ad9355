"""The web page: one document with its own style and script, which loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path

from megatron_parallel_r1.serve.served_model import ServedModel
from megatron_parallel_r1.thought.format_settings import format_of

TEMPLATES = Path(__file__).parent / "templates"


def build_page(served: ServedModel, needs_key: bool) -> tuple[str, str]:
    """Builds the page and the value of its Content-Security-Policy header, which allows only its own code.

    The script inserts generated text as text nodes; values inserted here are escaped.
    """
    style = _template("page.css")
    script = "\n".join(_template(file) for file in ("view.js", "link.js", "page.js"))
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    planned = format_of(served.thinking.format).plan is not None
    buttons = (f'<button type="button">{html.escape(example)}</button>' for example in served.examples)
    values = {
        "paths": str(served.thinking.paths),
        "hidden": " hidden" if planned else "",
        "disabled": " disabled" if planned else "",
        "key": "" if needs_key else " hidden",
        "examples": "\n".join(buttons),
        "no_examples": "" if served.examples else " hidden",
        "style": style,
        "script": script,
        "name": html.escape(served.name),
    }
    return re.sub(r"@(\w+)@", lambda match: values[match[1]], _template("page.html")), policy


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{digest}"
