"""The OpenAPI document of the HTTP API, made of the very models that requests are read and answers written with.

Source: https://spec.openapis.org/oas/v3.1.1.html
"""

from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema

from dispatcher.answers import ExportPage, ExportStatus, Health, Problem, Submitted
from dispatcher.contract import EXPORT_ID_FORM, JOB_ID_FORM, ExportRequest
from dispatcher.limits import MAX_BODY_BYTES, PAGE

Document = dict[str, Any]
_MODELS: tuple[tuple[type[BaseModel], JsonSchemaMode], ...] = (
    (ExportRequest, "validation"),
    *((model, "serialization") for model in (Submitted, ExportStatus, ExportPage, Health, Problem)),
)
_REFUSALS = {
    400: (
        "The request is wrong (`invalid_request`, `body_incomplete`), or the job cannot be exported as it is"
        " (`job_not_completed`, `job_document_invalid`, `too_many_files`, or what else is wrong with its adapter)."
    ),
    401: "Nobody vouches for the caller (`unauthenticated`).",
    403: "The job or export belongs to someone else (`not_yours`).",
    404: "There is no such job, export or adapter (`job_not_found`, `export_not_found`, `adapter_gone`), or route.",
    405: "The route does not take this method (`method_not_allowed`); what it takes is in `Allow`.",
    409: "The export has ended already (`conflict`).",
    413: f"The body is over {MAX_BODY_BYTES} bytes (`body_too_large`).",
    429: "The caller has too many unfinished exports (`too_many_exports`): wait for one to end.",
    500: "A fault of ours, logged under the id in `instance`.",
    503: "A record store, queue or bucket does not answer (`unavailable`). Nothing was lost: ask again.",
}
_SECONDS = {"type": "string", "pattern": "^[1-9][0-9]*$"}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"description": "`Bearer`.", "schema": {"type": "string"}, "required": True}},
    405: {"Allow": {"description": "The methods that it takes.", "schema": {"type": "string"}, "required": True}},
    429: {"Retry-After": {"description": "Seconds to wait.", "schema": _SECONDS, "required": True}},
    503: {"Retry-After": {"description": "Seconds to wait.", "schema": _SECONDS, "required": True}},
}
_EXAMPLES: dict[str, Document] = {
    "merged": {"job_id": "job-7f3a", "export_type": "merged"},
    "gguf": {"job_id": "job-7f3a", "export_type": "gguf", "quantization": "q4_k_m"},
}


class _Plain(GenerateJsonSchema):
    """Without a title per field, which would only repeat its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def document() -> Document:
    """The API as an OpenAPI 3.1 document, ready for JSON."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gemma-export",
            "version": version("gemma-export"),
            "description": "Fine-tuned Gemma models out of training: adapter, merged 16-bit or GGUF.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}],
        "paths": _paths(),
        "components": {
            "schemas": _schemas(),
            "responses": {str(status): _refusal(status) for status in _REFUSALS},
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "Checked by the API gateway, which names the caller to the dispatcher.",
                }
            },
        },
    }


def _paths() -> Document:
    export_id = {"name": "export_id", "in": "path", "required": True, "schema": {"type": "string", **EXPORT_ID_FORM}}
    return {
        "/export": {
            "post": {
                "operationId": "submitExport",
                "summary": "Ask for an export; again is no harm.",
                "requestBody": {
                    "required": True,
                    "content": {
                        "application/json": {
                            "schema": _named("ExportRequest"),
                            "examples": {name: {"value": value} for name, value in _EXAMPLES.items()},
                        }
                    },
                },
                "responses": {
                    "200": _answer("It is there: an adapter, or what was made for this very adapter.", "Submitted"),
                    "202": {
                        **_answer("It was queued, or is under way.", "Submitted"),
                        "headers": {
                            "Location": {
                                "description": "Where to ask how it is going.",
                                "schema": {"type": "string", "pattern": "^/exports/"},
                                "required": True,
                            }
                        },
                        "links": {
                            "status": _link("exportStatus", "$response.body#/export_id"),
                            "cancel": _link("cancelExport", "$response.body#/export_id"),
                        },
                    },
                    **_refused(400, 401, 403, 404, 413, 429, 500, 503),
                },
            }
        },
        "/exports": {
            "get": {
                "operationId": "listExports",
                "summary": f"The caller's own exports, {PAGE} a page, by id.",
                "parameters": [
                    _query("job_id", "Only this job's.", JOB_ID_FORM),
                    _query("after", "Those after this export id: the last page's `next`.", EXPORT_ID_FORM),
                ],
                "responses": {"200": _answer("A page.", "ExportPage"), **_refused(400, 401, 500, 503)},
            }
        },
        "/exports/{export_id}": {
            "get": {
                "operationId": "exportStatus",
                "summary": "How an export is going, and what came of it.",
                "parameters": [export_id],
                "responses": {"200": _answer("The export.", "ExportStatus"), **_refused(401, 403, 404, 500, 503)},
            }
        },
        "/exports/{export_id}/cancel": {
            "post": {
                "operationId": "cancelExport",
                "summary": "Stop an unfinished export; again is no harm.",
                "parameters": [export_id],
                "responses": {
                    "200": _answer("The cancelled export.", "ExportStatus"),
                    **_refused(401, 403, 404, 409, 500, 503),
                },
            }
        },
        "/health": {
            "get": {
                "operationId": "health",
                "summary": "Whether the service answers.",
                "security": [],
                "responses": {"200": _answer("It does.", "Health"), **_refused(500)},
            }
        },
    }


def _schemas() -> Document:
    _, made = models_json_schema(_MODELS, ref_template="#/components/schemas/{model}", schema_generator=_Plain)
    schemas: Document = made["$defs"]
    # What the model checks of two fields together.
    schemas["ExportRequest"] |= {
        "if": {"properties": {"quantization": {"type": "string"}}, "required": ["quantization"]},
        "then": {"properties": {"export_type": {"const": "gguf"}}},
    }
    return schemas


def _query(name: str, description: str, form: Document) -> Document:
    return {"name": name, "in": "query", "description": description, "schema": {"type": "string", **form}}


def _named(model: str) -> Document:
    return {"$ref": f"#/components/schemas/{model}"}


def _answer(description: str, model: str) -> Document:
    return {"description": description, "content": {"application/json": {"schema": _named(model)}}}


def _refused(*statuses: int) -> Document:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}


def _refusal(status: int) -> Document:
    headers = _HEADERS.get(status)
    body = {"content": {"application/problem+json": {"schema": _named("Problem")}}}
    return {"description": _REFUSALS[status]} | ({"headers": headers} if headers else {}) | body


def _link(operation: str, export_id: str) -> Document:
    return {"operationId": operation, "parameters": {"export_id": export_id}}
