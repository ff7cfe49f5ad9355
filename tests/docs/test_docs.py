"""Every document is linked; every link, named command and file, and quoted error message exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("docs/*.md")),
]
MODULE = re.compile(r"python -m\s+((?:benchmarks|recipes|megatron_parallel_r1|tests)[\w.]*\w)")
NAMED = re.compile(r"\b((?:recipes|tests|slurm|benchmarks|examples)/[\w./-]+\.(?:py|yaml|sh))\b")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_local_links_exist(document: Path) -> None:
    links = [link for link in LINK.findall(document.read_text()) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_files_that_are_named_exist(document: Path) -> None:
    text = document.read_text()
    places = [ROOT / module.replace(".", "/") for module in MODULE.findall(text)]
    missing = [str(place) for place in places if not (place.is_dir() or place.with_suffix(".py").is_file())]
    assert missing + [name for name in NAMED.findall(text) if not (ROOT / name).is_file()] == []


def test_index_links_every_document() -> None:
    linked = {(ROOT / "docs" / link).resolve() for link in LINK.findall((ROOT / "docs/index.md").read_text())}
    assert [
        path.name for path in ROOT.glob("docs/*.md") if path not in linked and path.name != "index.md"
    ] == []


def test_every_quoted_message_is_in_the_source() -> None:
    source = " ".join(path.read_text() for path in (ROOT / "megatron_parallel_r1").rglob("*.py"))
    # Messages are split over string literals and lines.
    source = re.sub(r"\"\s*f?\"", "", source)
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 20
    parts = [part.strip() for message in messages for part in message.split("…")]
    assert [part for part in parts if part not in source] == []
