"""The description of the HTTP API, made from the messages' own types and bounds (OpenAPI 3.1).

Not here: the addresses (``api.py``), what is said when (docs/protocol.md).
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from foedus.errors import Code
from foedus.net.api import BYTES, MEDIA, OFFSET, PATHS, STATUS
from foedus.protocol.messages import ANSWERS, KINDS, Long, Message, Problem, Within

_NAMES = {kind: name for name, kind in KINDS.items()}
_PLAIN: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"}, float: {"type": "number"}, bool: {"type": "boolean"}, str: {"type": "string"},
    bytes: {"type": "string", "contentEncoding": "binary"},
}  # fmt: skip


@cache
def document() -> dict[str, Any]:
    """The whole description.

    Example:
        >>> sorted(document()["paths"])[:2]
        ['/health', '/leading']
    """
    schemas: dict[str, Any] = {}
    for kind in KINDS.values():
        _schema(kind, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "foedus",
            "version": _version(),
            "description": "What clients ask a server. Messages are MessagePack arrays of major version, "
            "minor version, kind and fields; docs/protocol.md says what MUST be done.",
        },
        "security": [{"ticket": []}],
        "paths": {path: {"post": _asked(kind)} for kind, path in PATHS.items()} | _others(),
        "components": {
            "schemas": schemas,
            "securitySchemes": {"ticket": {"type": "http", "scheme": "bearer", "description": "from POST /v1/session"}},
        },
    }


def _asked(kind: type[Message]) -> dict[str, Any]:
    """A request that is a message."""
    answers = [_NAMES[answer] for answer in ANSWERS[kind]]
    return {
        "summary": (kind.__doc__ or "").strip().partition("\n")[0],
        "requestBody": {"required": True, "content": {MEDIA: {"schema": _reference(kind)}}},
        "responses": {
            "200": {
                "description": ", or ".join(answers),
                "content": {MEDIA: {"schema": {"oneOf": [_reference(KINDS[name]) for name in answers]}}},
            },
            **_problems(),
        },
    }


def _problems() -> dict[str, Any]:
    """The answers that say that it cannot be served, by status."""
    found: dict[int, list[str]] = {}
    for code in Code:
        found.setdefault(STATUS.get(code, 422), []).append(str(code))
    content = {MEDIA: {"schema": _reference(Problem)}}
    return {str(status): {"description": ", ".join(codes), "content": content} for status, codes in found.items()}


def _others() -> dict[str, Any]:
    """The requests that are no messages."""

    def named(name: str, length: int | None = None) -> dict[str, Any]:
        pattern = {} if length is None else {"pattern": f"^[0-9a-f]{{{length}}}$"}
        return {"name": name, "in": "path", "required": True, "schema": {"type": "string"} | pattern}

    def number(name: str, told: str) -> dict[str, Any]:
        schema = {"type": "integer", "minimum": 0}
        return {"name": name, "in": "query", "description": told, "schema": schema}

    offset = {OFFSET: {"description": "how many bytes have come", "schema": {"type": "integer"}}}
    bytes_ = {BYTES: {"schema": {"type": "string", "format": "binary"}}}
    open_: dict[str, Any] = {"security": []}
    return {
        "/v1/blobs/{digest}": {
            "get": {
                "summary": "Bytes by their SHA-256: orders, models, bundles.",
                "parameters": [named("digest", 64)],
                "responses": {
                    "200": {"description": "the bytes", "content": bytes_},
                    "206": {"description": "the part that Range names", "content": bytes_},
                    "304": {"description": "the caller has them"},
                    "416": {"description": "there is no such part"},
                }
                | _problems(),
            }
        },
        "/v1/uploads/{upload}": {
            "put": {
                "summary": "Bytes of an upload, from an offset on.",
                "parameters": [named("upload", 32), number("offset", "where the bytes begin")],
                "requestBody": {"required": True, "content": bytes_},
                "responses": {"200": {"description": "they have come", "headers": offset}} | _problems(),
            },
            "head": {
                "summary": "How far an upload has come.",
                "parameters": [named("upload", 32)],
                "responses": {"200": {"description": "so far", "headers": offset}} | _problems(),
            },
        },
        "/v1/runs": {"get": _json("All runs.")},
        "/v1/runs/{run}": {"get": _json("One run.", named("run"))},
        "/v1/runs/{run}/{file}": {
            "get": _json("Lines of a run's record.", named("run"), named("file"), number("after", "a round"))
        },
        "/health": {"get": open_ | _json("Whether the process lives.")},
        "/leading": {"get": open_ | _json("200 where requests are to go, 503 elsewhere.")},
        "/metrics": {"get": open_ | _json("Figures for Prometheus.")},
        "/openapi.json": {"get": open_ | _json("This document.")},
    }


def _json(summary: str, *parameters: dict[str, Any]) -> dict[str, Any]:
    answered = {"200": {"description": "as asked"}}
    return {"summary": summary, "parameters": list(parameters), "responses": answered | _problems()}


def _reference(kind: type) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _schema(kind: type, schemas: dict[str, Any]) -> dict[str, Any]:
    """A message's fields, put among the schemas; a reference to them."""
    if kind.__name__ not in schemas:
        schemas[kind.__name__] = {}
        hints = get_type_hints(kind, include_extras=True)
        fields = dataclasses.fields(kind)
        schemas[kind.__name__] = {
            "type": "object",
            "description": (kind.__doc__ or "").strip().partition("\n\n")[0],
            "properties": {field.name: _type(hints[field.name], schemas) for field in fields},
            "required": [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING],
            "additionalProperties": False,
        }
    return _reference(kind)


def _type(kind: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """A field's type and bounds."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = _type(inner[0], schemas)
        return found | _bound(found, inner[1])
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(each, schemas) for each in inner if each is not type(None)] + [{"type": "null"}]}
    if origin is tuple:
        return {"type": "array", "items": _type(inner[0], schemas)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _type(inner[1], schemas)}
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return {"enum": [str(each) for each in kind]}
    return dict(_PLAIN[kind]) if kind in _PLAIN else _schema(kind, schemas)


def _bound(found: Mapping[str, Any], bound: Any) -> dict[str, Any]:
    if isinstance(bound, Within):
        return {"minimum": bound.low, "maximum": bound.high}
    assert isinstance(bound, Long)
    words = {"array": ("minItems", "maxItems"), "object": ("minProperties", "maxProperties")}
    low, high = words.get(str(found.get("type")), ("minLength", "maxLength"))
    return {low: bound.low, high: bound.high}


def _version() -> str:
    try:
        return version("foedus")
    except PackageNotFoundError:
        return "0"
