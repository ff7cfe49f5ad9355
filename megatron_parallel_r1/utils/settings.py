"""The base of all settings that a user writes into a YAML file, their types and their errors."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from typing_extensions import Self

from megatron_parallel_r1.errors import UserError


class Settings(BaseModel):
    """Frozen settings. An unknown key is an error; the string below a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def read(cls, values: Any, where: str, context: Mapping[str, Any] | None = None) -> Self:
        """Validates the values of a file; `where` names it in an error, `context` is for validators.

        Raises:
            UserError: a key is unknown, missing or ill-typed, or a value is impossible.
        """
        try:
            return cls.model_validate(values, context=context)
        except ValidationError as error:
            raise UserError(f"{where}: {first_problem(error, cls, values)}") from None

    def replace(self, **changes: Any) -> Self:
        """A validated copy with other values.

        Raises:
            ValueError: a value is impossible.
        """
        return type(self)(**(dict(self) | changes))


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit of a number, for the JSON schema and the recipe reference."""

    name: str

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return handler(core_schema) | {"unit": self.name}


Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Tokens = Annotated[int, Field(ge=1), Unit("tokens")]
TokensOrZero = Annotated[int, Field(ge=0), Unit("tokens")]
Steps = Annotated[int, Field(ge=1), Unit("steps")]
StepsOrZero = Annotated[int, Field(ge=0), Unit("steps")]
Bytes = Annotated[int, Field(ge=1), Unit("bytes")]
Ranks = Annotated[int, Field(ge=1), Unit("processes")]
Seconds = Annotated[float, Field(gt=0), Unit("seconds")]
Share = Annotated[float, Field(ge=0.0, le=1.0), Unit("share, 0 to 1")]


def first_problem(
    error: ValidationError, settings: type[BaseModel], values: Any = None, inside: str | None = None
) -> str:
    """The first problem of a failed validation, in one line that names the key.

    Args:
        settings: the type that was read.
        values: what was read; members of its lists are then named by their `name` instead of their index.
        inside: key that holds the settings.
    """
    problems = error.errors()
    first = problems[0]
    keys, siblings = _locate(first["loc"], settings.model_json_schema(), values)
    where = ".".join([inside, *keys] if inside else keys)
    match first["type"]:
        case "extra_forbidden":
            close = difflib.get_close_matches(keys[-1], siblings, 1)
            what = f"unknown key; did you mean {siblings[close[0]]}?" if close else "unknown key"
        case "missing":
            what = "missing key"
        case _:
            what = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    if first["type"] != "extra_forbidden" and isinstance(value, str | int | float | bool):
        what += f" (given {value!r})"
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"{where}: {what}{more}" if where else what + more


def _locate(
    path: Sequence[str | int], schema: dict[str, Any], values: Any
) -> tuple[list[str], dict[str, str]]:
    """The path of an error as the user wrote it, and the keys at its end, by their last part."""
    keys: list[str] = []
    node, siblings = _resolved(schema, schema), dict[str, str]()
    for part in path:
        if part in node.get("discriminator", {}).get("mapping", {}):  # the chosen member of a union, no key
            node = _resolved({"$ref": node["discriminator"]["mapping"][part]}, schema)
            continue
        if "anyOf" in node:  # likewise
            continue
        siblings = _keys_below(node, schema)
        if isinstance(part, int):
            item = values[part] if isinstance(values, list) and part < len(values) else None
            name = item.get("name") if isinstance(item, dict) else None
            keys.append(str(name or part))
            inner, values = node.get("items", {}), item
        else:
            keys.append(part)
            inner = node.get("properties", {}).get(part, node.get("additionalProperties", {}))
            values = values.get(part) if isinstance(values, dict) else None
        node = _resolved(inner if isinstance(inner, dict) else {}, schema)
    return keys, siblings


def _keys_below(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, str]:
    """Keys of a mapping, and those one level deeper (`lr` -> `optimizer.lr`)."""
    properties = node.get("properties", {})
    deeper = {
        inner: f"{key}.{inner}"
        for key, value in properties.items()
        for inner in _resolved(value, schema).get("properties", ())
    }
    return deeper | {key: key for key in properties}


def _resolved(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Follows references and the one way that is not null."""
    while True:
        ways = [way for way in node.get("anyOf", ()) if way.get("type") != "null"]
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        elif len(ways) == 1:
            node = ways[0]
        else:
            return node
