"""The description of the API: `/openapi.json`, and `/docs`, a page of it that loads nothing else."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from megatron_parallel_r1.serve.response_schema import (
    ChatCompletion,
    ErrorResponse,
    Health,
    ModelEntry,
    ModelList,
    Readiness,
    TextCompletion,
)
from megatron_parallel_r1.serve.schema import ChatRequest, CompletionRequest

REFERENCE = "#/components/schemas/{model}"


class _Operation(BaseModel):
    """An address: its summary, the body that it reads, and what it responds with; a text is a media type."""

    method: Literal["get", "post"]
    path: str
    summary: str
    response: type[BaseModel] | str
    request: type[BaseModel] | None = None


OPERATIONS = (
    _Operation(
        method="post",
        path="/v1/chat/completions",
        summary="Responds to a conversation. With `stream: true` as server-sent events, to `data: [DONE]`.",
        request=ChatRequest,
        response=ChatCompletion,
    ),
    _Operation(
        method="post",
        path="/v1/completions",
        summary="Continues a prompt without any template, or scores it.",
        request=CompletionRequest,
        response=TextCompletion,
    ),
    _Operation(method="get", path="/v1/models", summary="Lists the one model.", response=ModelList),
    _Operation(method="get", path="/v1/models/{name}", summary="Describes the model.", response=ModelEntry),
    _Operation(method="get", path="/health", summary="Says how busy the server is.", response=Health),
    _Operation(method="get", path="/ready", summary="Says whether a request is taken.", response=Readiness),
    _Operation(method="get", path="/metrics", summary="Counters for Prometheus.", response="text/plain"),
    _Operation(method="get", path="/", summary="The web page.", response="text/html"),
)


def describe(needs_key: bool) -> dict[str, Any]:
    """The API in OpenAPI 3.1."""
    bodies: list[type[BaseModel]] = [ErrorResponse]
    bodies += (body for operation in OPERATIONS for body in _bodies(operation))
    modes: list[tuple[type[BaseModel], Literal["validation"]]] = [(body, "validation") for body in bodies]
    _, definitions = models_json_schema(modes, ref_template=REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, needs_key)
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    info = {"title": "megatron_parallel_r1", "version": "1"}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def documentation_page(described: Mapping[str, Any]) -> str:
    """A page of the API without scripts."""
    schemas = described["components"]["schemas"]
    parts = []
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2>{method.upper()} <code>{html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation['summary'])}</p>")
            shown = [operation["requestBody"]] if "requestBody" in operation else []
            shown.append(operation["responses"]["200"])
            names = [_name(content) for body in shown for content in body.get("content", {}).values()]
            parts += [f'<p><a href="#{name}">{name}</a></p>' for name in names if name]
    for name, schema in schemas.items():
        parts.append(f'<h3 id="{name}">{name}</h3><p>{html.escape(schema.get("description", ""))}</p><table>')
        for field, value in schema.get("properties", {}).items():
            kind = html.escape(_kind(value))
            text = html.escape(value.get("description", ""))
            parts.append(f"<tr><td><code>{html.escape(field)}</code></td><td>{kind}</td><td>{text}</td></tr>")
        parts.append("</table>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width"><title>API</title><h1>API</h1>'
        '<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>' + "\n".join(parts)
    )


def _bodies(operation: _Operation) -> list[type[BaseModel]]:
    return [body for body in (operation.request, operation.response) if isinstance(body, type)]


def _described(operation: _Operation, needs_key: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"summary": operation.summary}
    if "{name}" in operation.path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        found["parameters"] = [name]
    if operation.request is not None:
        found["requestBody"] = {"required": True, "content": _json(operation.request)}
    response = operation.response
    content = {response: {"schema": {"type": "string"}}} if isinstance(response, str) else _json(response)
    if operation.request is not None:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    found["responses"] = {
        "200": {"description": "OK", "content": content},
        "default": {"description": "An error", "content": _json(ErrorResponse)},
    }
    if needs_key and operation.path.startswith("/v1"):
        found["security"] = [{"key": []}]
    return found


def _json(body: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REFERENCE.format(model=body.__name__)}}}


def _name(content: Mapping[str, Any]) -> str:
    return str(content["schema"].get("$ref", "")).rpartition("/")[2]


def _kind(schema: Mapping[str, Any]) -> str:
    """A field's type in words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " | ".join(map(_kind, options))
    if "enum" in schema or "const" in schema:
        return " | ".join(map(repr, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "any"))
