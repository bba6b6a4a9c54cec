"""Swagger 2.0 of an OpenAPI 3.1 document, since the API gateway's own documents are of the older form.

It is made by rules alone. A key that no rule knows is an error; one that is left out is in DROPPED, with its reason.

Sources: https://spec.openapis.org/oas/v2.0.html, https://spec.openapis.org/oas/v3.1.1.html, and for what the gateway
refuses of either https://cloud.google.com/api-gateway/docs/openapi-limitations
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

Document = dict[str, Any]
Rule = Callable[[Any, str], Document]
"""What the value of a key becomes, given where it stands."""

DROPPED = {
    ("document", "servers"): "The gateway has an address of its own.",
    ("license", "identifier"): "Swagger 2.0 knows a licence's name and URL alone.",
    ("components", "responses"): "Each is written out where it is named, so that nobody has to resolve references.",
    ("media type", "examples"): "A body has no examples in Swagger 2.0.",
    ("response", "links"): "Swagger 2.0 has none.",
    ("header", "required"): "Swagger 2.0 cannot require a header of an answer.",
    ("security scheme", "bearerFormat"): "Swagger 2.0 has no word for it; the gateway knows no other than JWT.",
    ("schema", "if"): "Swagger 2.0 has no conditions; the service refuses what this one forbids.",
    ("schema", "then"): "As for `if`.",
    ("schema", "writeOnly"): "Swagger 2.0 has readOnly alone.",
}

_METHODS = ("get", "put", "post", "delete", "options", "head", "patch")
_FLAT = {"type", "format", "enum", "default", "pattern", "minimum", "maximum", "minLength", "maxLength", "multipleOf"}
"""What may be said of a parameter that is no body, or of a header."""
_OPERATION_ID = re.compile(r"[A-Za-z]\w*", re.ASCII)
"""It becomes part of a selector in Google's service config."""
_PATH = re.compile(r"(/(\{\w+\}|[\w.~-]+))+", re.ASCII)
"""The gateway refuses a parameter that is not a whole segment."""


class UntranslatableError(Exception):
    """The document says what Swagger 2.0, or the gateway, has no words for."""


def swagger(document: Document) -> Document:
    """An OpenAPI 3.1 document as Swagger 2.0, without host and schemes.

    Raises:
        UntranslatableError: There is something in it that no rule knows; the message says where.
    """
    rules: dict[str, Rule] = {
        "openapi": lambda value, where: {"swagger": "2.0"},
        "info": _under("info", _info),
        "security": partial(_same, "security"),
        "paths": _each("paths", partial(_path, document)),
        "components": _components,
    }
    made = _translated("document", document, "#", rules)
    order = ("swagger", "info", "securityDefinitions", "security", "paths", "definitions")
    return {key: made[key] for key in order if key in made}


def _translated(kind: str, node: Any, where: str, rules: Mapping[str, Rule]) -> Document:
    if not isinstance(node, dict):
        raise UntranslatableError(f"{where} is no {kind}: expected an object, found {node!r}")
    made: Document = {}
    for key, value in node.items():
        if (kind, key) in DROPPED:
            continue
        if key not in rules:
            raise UntranslatableError(f"{where}: no rule says what {key!r} of a {kind} is in Swagger 2.0")
        new = rules[key](value, f"{where}/{key}")
        if twice := made.keys() & new.keys():
            raise UntranslatableError(f"{where}: {', '.join(sorted(twice))} would be there twice")
        made |= new
    return made


def _same(key: str, value: Any, where: str) -> Document:
    return {key: value}


def _kept(*keys: str) -> dict[str, Rule]:
    return {key: partial(_same, key) for key in keys}


def _under(key: str, translate: Rule) -> Rule:
    return lambda value, where: {key: translate(value, where)}


def _each(key: str, translate: Rule) -> Rule:
    return lambda value, where: {key: {name: translate(item, f"{where}/{name}") for name, item in value.items()}}


def _info(node: Any, where: str) -> Document:
    named = _under("license", lambda value, at: _translated("license", value, at, _kept("name", "url")))
    return _translated("info", node, where, {**_kept("title", "version", "description"), "license": named})


def _components(node: Any, where: str) -> Document:
    rules = {
        "schemas": _each("definitions", _schema),
        "securitySchemes": _each("securityDefinitions", _security_scheme),
    }
    return _translated("components", node, where, rules)


def _security_scheme(node: Any, where: str) -> Document:
    if (node.get("type"), node.get("scheme")) != ("http", "bearer"):
        raise UntranslatableError(f"{where}: expected a bearer token, the one thing that is translated")
    # The form in which the gateway is told of JWTs: https://cloud.google.com/api-gateway/docs/authenticating-users-jwt
    rules: dict[str, Rule] = {
        **_kept("description"),
        "type": lambda value, at: {"type": "oauth2", "flow": "implicit", "authorizationUrl": ""},
        "scheme": lambda value, at: {},
    }
    return _translated("security scheme", node, where, rules)


def _path(document: Document, node: Any, where: str) -> Document:
    path = where.removeprefix("#/paths/")
    if not _PATH.fullmatch(path):
        raise UntranslatableError(f"{where}: expected a path whose parameters are whole segments, found {path!r}")
    rules = {method: _under(method, partial(_operation, document)) for method in _METHODS}
    return _translated("path", node, where, rules)


def _operation(document: Document, node: Document, where: str) -> Document:
    if not _OPERATION_ID.fullmatch(str(node.get("operationId"))):
        raise UntranslatableError(f"{where}/operationId: expected letters, digits and _, a letter first")
    named = document["components"].get("responses", {})
    responses = {status: _resolved(answer, named) for status, answer in node["responses"].items()}
    parameters = [_parameter(item, f"{where}/parameters/{at}") for at, item in enumerate(node.get("parameters", []))]
    body = node.get("requestBody")
    if body:
        parameters.append(_body(body, f"{where}/requestBody"))
    rest = {key: value for key, value in node.items() if key not in ("requestBody", "parameters", "responses")}
    kept = _kept("operationId", "summary", "description", "tags", "deprecated", "security")
    return {
        **_translated("operation", rest, where, kept),
        **({"consumes": list(body["content"])} if body else {}),
        "produces": list(dict.fromkeys(media for answer in responses.values() for media in answer.get("content", {}))),
        **({"parameters": parameters} if parameters else {}),
        "responses": {status: _response(answer, f"{where}/responses/{status}") for status, answer in responses.items()},
    }


def _resolved(node: Document, named: Document) -> Document:
    answer: Document = named.get(str(node.get("$ref")).removeprefix("#/components/responses/"), node)
    return answer


def _parameter(node: Any, where: str) -> Document:
    if node.get("in") not in ("path", "query", "header"):
        raise UntranslatableError(f"{where}: expected one in path, query or header, found {node.get('in')!r}")
    return _translated("parameter", node, where, {**_kept("name", "in", "description", "required"), "schema": _flat})


def _body(node: Any, where: str) -> Document:
    made = _translated("body", node, where, {**_kept("description", "required"), "content": _content})
    return {"name": "body", "in": "body", **made}


def _response(node: Any, where: str) -> Document:
    rules = {**_kept("description"), "headers": _each("headers", _header), "content": _content}
    return _translated("response", node, where, rules)


def _header(node: Any, where: str) -> Document:
    return _translated("header", node, where, {**_kept("description"), "schema": _flat})


def _content(value: Document, where: str) -> Document:
    if len(value) != 1:
        raise UntranslatableError(f"{where}: expected one media type, since Swagger 2.0 has one schema for them all")
    [(kind, media)] = value.items()
    return _translated("media type", media, f"{where}/{kind}", {"schema": _under("schema", _schema)})


def _flat(value: Any, where: str) -> Document:
    made = _schema(value, where)
    if more := made.keys() - _FLAT:
        raise UntranslatableError(f"{where}: Swagger 2.0 cannot say {', '.join(sorted(more))} outside a body")
    return made


def _schema(node: Any, where: str) -> Document:
    made = _translated("schema", node, where, _SCHEMA)
    if "$ref" in made and (more := made.keys() - {"$ref", "description", "x-nullable"}):
        raise UntranslatableError(f"{where}: Swagger 2.0 ignores {', '.join(sorted(more))} beside a $ref")
    return made


def _reference(value: str, where: str) -> Document:
    if not value.startswith("#/components/schemas/"):
        raise UntranslatableError(f"{where}: expected one of the document's own schemas, found {value!r}")
    return {"$ref": value.replace("#/components/schemas/", "#/definitions/")}


def _type(value: Any, where: str) -> Document:
    types = [value] if isinstance(value, str) else value
    others = [name for name in types if name != "null"]
    if len(others) != 1:
        raise UntranslatableError(f"{where}: expected one type, or one and null, found {value!r}")
    return {"type": others[0]} | ({"x-nullable": True} if len(types) > 1 else {})


def _any_of(value: list[Any], where: str) -> Document:
    others = [(at, schema) for at, schema in enumerate(value) if schema != {"type": "null"}]
    if len(others) != 1 or len(value) != 2:
        raise UntranslatableError(f"{where}: expected one schema and null, found {len(others)} schemas")
    [(at, schema)] = others
    return {**_schema(schema, f"{where}/{at}"), "x-nullable": True}


def _additional(value: Any, where: str) -> Document:
    return {"additionalProperties": value if isinstance(value, bool) else _schema(value, where)}


def _exclusive(bound: str, value: Any, where: str) -> Document:
    return {bound: value, f"exclusive{bound.capitalize()}": True}


_SCHEMA: dict[str, Rule] = {
    **_kept("title", "description", "format", "enum", "pattern", "minimum", "maximum", "multipleOf", "readOnly"),
    **_kept("minLength", "maxLength", "minItems", "maxItems", "uniqueItems", "required"),
    "type": _type,
    "const": lambda value, where: {"enum": [value]},
    # Null is of no type there; and to leave a field out is to say null anyway.
    "default": lambda value, where: {} if value is None else {"default": value},
    "examples": lambda value, where: {"example": value[0]},
    "exclusiveMinimum": partial(_exclusive, "minimum"),
    "exclusiveMaximum": partial(_exclusive, "maximum"),
    "properties": _each("properties", _schema),
    "items": _under("items", _schema),
    "additionalProperties": _additional,
    "anyOf": _any_of,
    "$ref": _reference,
}
