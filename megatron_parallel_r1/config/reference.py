"""Writes docs/recipe_reference.md, every key of a recipe, from the settings types.

python -m megatron_parallel_r1.config.reference
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_parallel_r1.config.recipe import Recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipe_reference.md"
HEAD = """# Recipe reference

Every key of a recipe, generated from the settings types by `python -m megatron_parallel_r1.config.reference`;
do not edit it by hand. `parallel-r1 schema` prints the JSON schema for editors. Any key can be set on the
command line by its path, such as `stages.rl_hard.optimizer.lr=1.0e-6`; a member of a list is addressed by its
`name` or its index. A default of "–" means that the key is required.

A file with the key `recipe`, a path relative to its own folder, has that file's recipe with its own keys laid
over it: mappings key by key, stages by their names. With the key `stage` it stands for one stage of it.
`recipes/qwen3_8b/` has examples.
"""


def reference() -> str:
    """The page, in Markdown: one table for each type of settings, in the order in which they are met."""
    schema = Recipe.model_json_schema()
    definitions = schema.pop("$defs")
    order, sections = ["Recipe"], []
    for name in order:
        section = schema if name == "Recipe" else definitions[name]
        order += [other for other in _references(section.get("properties", {})) if other not in order]
        sections.append("\n".join(_section(name, section)))
    return "\n".join([HEAD, *sections])


def _section(name: str, section: dict[str, Any]) -> Iterator[str]:
    yield f"## {name}\n"
    yield f"{_one_line(section['description'])}\n"
    yield "| key | type | unit | default | meaning |"
    yield "|---|---|---|---|---|"
    required = section.get("required", ())
    for key, value in section["properties"].items():
        default = "–" if key in required else f"`{_default(value)}`"
        cells = (f"`{key}`", _type(value), _unit(value), default, _one_line(value.get("description", "")))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _references(node: Any) -> Iterator[str]:
    """Names of the types that a schema refers to, in order."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        for key, inner in node.items():
            if key not in ("$ref", "discriminator", "default"):
                yield from _references(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from _references(inner)


def _type(node: dict[str, Any]) -> str:
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if ways := node.get("anyOf") or node.get("oneOf"):
        return " or ".join(_type(way) for way in ways)
    if "prefixItems" in node:
        return "list of " + ", ".join(_type(item) for item in node["prefixItems"])
    if node.get("type") == "array":
        return f"list of {_type(node['items'])}"
    if node.get("type") == "object":
        values = node.get("additionalProperties")
        return f"mapping of names to {_type(values)}" if isinstance(values, dict) and values else "mapping"
    name = "path" if node.get("format") == "path" else node.get("type", "any")
    return name + _bounds(node)


def _bounds(node: dict[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {node[key]:g}" for key, sign in signs.items() if key in node]
    return f" {', '.join(bounds)}" if bounds else ""


def _unit(node: dict[str, Any]) -> str:
    for way in (node, *node.get("anyOf", ())):
        if "unit" in way:
            return way["unit"]
    return ""


def _default(node: dict[str, Any]) -> str:
    default = node.get("default", {})
    return "{}" if isinstance(default, dict) else json.dumps(default, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    PAGE.write_text(reference(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
