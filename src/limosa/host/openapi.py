"""The OpenAPI document, made from the same list of endpoints the server binds."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from limosa import __version__
from limosa.model.base import Model
from limosa.model.migration import Fault
from limosa.wire.api import Empty
from limosa.wire.endpoints import ENDPOINTS, Endpoint, Role

_REF = "#/components/schemas/{name}"


def document() -> dict[str, Any]:
    """OpenAPI 3.1 of the host API."""
    types: set[type[Model]] = {
        Fault,
        *(endpoint.request for endpoint in ENDPOINTS),
        *(endpoint.reply for endpoint in ENDPOINTS),
    }
    ordered = sorted(types, key=lambda cls: cls.__name__)
    references, components = msgspec.json.schema_components(ordered, ref_template=_REF)
    components = _portable(components)
    schema = dict(zip(ordered, references, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, schema)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Limosa host API", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }


def _portable(schema: Any) -> Any:
    """The same with patterns as JSON Schema has them: ECMAScript's ``^`` and ``$`` are Python's ``\\A`` and ``\\Z``."""
    if isinstance(schema, dict):
        ported = {key: _portable(value) for key, value in schema.items()}
        if isinstance(ported.get("pattern"), str):
            ported["pattern"] = ported["pattern"].replace(r"\A", "^").replace(r"\Z", "$")
        return ported
    return [_portable(item) for item in schema] if isinstance(schema, list) else schema


def _operation(endpoint: Endpoint[Any, Any], schema: dict[Any, Any]) -> dict[str, Any]:
    media = "application/x-ndjson" if endpoint.stream else "application/json"
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "description": f"For the roles {', '.join(role.name.lower() for role in Role if role >= endpoint.role)}.",
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", endpoint.path)
        ],
        "responses": {
            "200": {"description": "done", "content": {media: {"schema": schema[endpoint.reply]}}},
            "default": {"description": "refused", "content": {"application/json": {"schema": schema[Fault]}}},
        },
    }
    if endpoint.request is not Empty:
        body = {"application/json": {"schema": schema[endpoint.request]}}
        operation["requestBody"] = {"required": True, "content": body}
    return operation
