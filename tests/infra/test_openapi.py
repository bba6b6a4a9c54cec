"""infra/openapi.yaml is the contract in the gateway's dialect: all of it, nothing else, and as Terraform reads it."""

import base64
import copy
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV2SpecValidator
from pydantic import BaseModel

from dispatcher import answers, contract
from dispatcher.openapi import document
from infra.local.servers import MissingServerError
from infra.openapi import PLACE, VARIABLES, gateway_document, main, read, template
from infra.swagger import DROPPED, Document, UntranslatableError, swagger
from tests.conftest import missing

VALUES = {
    "backend_url": "https://export-api-abc123-uc.a.run.app",
    "jwt_issuer": "https://securetoken.google.com/some-project",
    "jwt_jwks_uri": "https://issuer.example.com/keys?of=a&b#c",
    "jwt_audiences": "1234567",  # which bare would be a number
}


def rendered(values: Mapping[str, str], file: Path = PLACE) -> Document:
    """The file as Terraform's own templatefile fills it in, and as it goes into the gateway's configuration."""
    program = shutil.which("terraform")
    if program is None:
        missing(MissingServerError("terraform: install it from https://developer.hashicorp.com/terraform/install"))
    expression = f"base64encode(templatefile({json.dumps(str(file))}, {json.dumps(dict(values))}))"
    environment = {**os.environ, "CHECKPOINT_DISABLE": "1", "TF_CLI_CONFIG_FILE": os.devnull}
    # A directory of its own: Terraform would read what configuration there is, and locks its state.
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [program, "console"],
            cwd=empty,
            env=environment,
            input=expression,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return read(base64.b64decode(done.stdout.strip().strip('"')).decode())


def operations(made: Document) -> dict[tuple[str, str], Document]:
    return {(path, method): operation for path, item in made["paths"].items() for method, operation in item.items()}


@pytest.fixture
def made() -> Document:
    return gateway_document(document(), VALUES)


def test_the_committed_file_is_what_the_contract_says_now(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever changes the one runs `python -m infra.openapi`."""
    status = main(["--check"])
    assert status == 0, capsys.readouterr().err


def test_a_file_that_differs_is_told_apart_and_made_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the lines that differ; and so is one that is not there."""
    file = tmp_path / "openapi.yaml"
    assert main(["--check", "--file", str(file)]) == 1
    file.write_text(PLACE.read_text().replace("operationId: cancelExport", "operationId: stopExport"))
    capsys.readouterr()
    assert main(["--check", "--file", str(file)]) == 1
    said = capsys.readouterr().err
    assert "-      operationId: stopExport\n+      operationId: cancelExport\n" in said
    assert "run `python -m infra.openapi`" in said
    assert main(["--file", str(file)]) == 0
    assert main(["--check", "--file", str(file)]) == 0
    assert file.read_bytes() == PLACE.read_bytes()


def test_terraform_renders_the_file_as_it_is_meant(made: Document) -> None:
    """Every variable in its place, as text; and no pattern of the contract's taken for a variable."""
    assert rendered(VALUES) == made


def test_what_looks_like_a_variable_in_the_contract_is_none(tmp_path: Path) -> None:
    """Wherever it stands: Terraform would fail on it, or fill it in."""
    texts = ["${backend_url}", "%{ if true }", "$${x}", "%%%{x", "a$", "100 %", "{$}", "$ {", 'é"\\${\n#', "- x: ${"]
    changed = document()
    changed["info"]["description"] = " ".join(texts)
    changed["components"]["schemas"]["Failure"]["properties"]["code"]["enum"] = texts
    file = tmp_path / "openapi.yaml"
    file.write_text(template(changed))
    assert rendered(VALUES, file) == gateway_document(changed, VALUES)


def test_a_value_is_a_value_whatever_is_in_it() -> None:
    """No text that Terraform fills in becomes a piece of the document."""
    values = {name: f"\"{name}': [#\\ é\n- x: {{" for name in VARIABLES}
    assert rendered(values) == gateway_document(document(), values)


def test_the_file_is_valid_swagger() -> None:
    """By the schema that the gateway checks it with too, but for the empty URL that Google's own pages prescribe."""
    found = rendered(VALUES)
    [scheme] = found["securityDefinitions"].values()
    assert scheme["authorizationUrl"] == ""
    scheme["authorizationUrl"] = VALUES["jwt_issuer"]
    assert list(OpenAPIV2SpecValidator(found).iter_errors()) == []


def test_nothing_in_the_file_is_an_alias_or_leads_outside() -> None:
    """The gateway bounds the one and refuses the other."""
    text = PLACE.read_text()
    assert "&id" not in text
    assert "*id" not in text
    references = [line.split("$ref:")[1].strip(" '") for line in text.splitlines() if "$ref:" in line]
    assert set(references) == {f"#/definitions/{name}" for name in read(text)["definitions"]}


def test_the_routes_are_the_contracts(made: Document) -> None:
    """Each with its name, its parameters and every status; and no other."""
    wanted, found = operations(document()), operations(made)
    assert found.keys() == wanted.keys()
    for route, operation in found.items():
        assert operation["operationId"] == wanted[route]["operationId"]
        assert operation["responses"].keys() == wanted[route]["responses"].keys()
        parameters = [(item["in"], item["name"]) for item in wanted[route].get("parameters", [])]
        parameters += [("body", "body")] if "requestBody" in wanted[route] else []
        assert [(item["in"], item["name"]) for item in operation.get("parameters", [])] == parameters
    assert len(found) == 5


def test_the_gateway_lets_through_what_is_listed_and_shows_the_backend_its_own_token(made: Document) -> None:
    """Under the paths of the contract; to all else it answers itself. No operation has a backend of its own."""
    extensions = {key: value for key, value in made.items() if key.startswith("x-google-")}
    assert extensions == {
        "x-google-allow": "configured",
        "x-google-backend": {
            "address": VALUES["backend_url"],
            "path_translation": "APPEND_PATH_TO_ADDRESS",
            "jwt_audience": VALUES["backend_url"],
            "deadline": 60.0,
        },
    }
    assert not [key for found in operations(made).values() for key in found if key.startswith("x-google-")]


def test_every_route_but_health_asks_for_a_token(made: Document) -> None:
    """Of the issuer that Terraform fills in, in the one place where it is not logged."""
    security = {route: operation.get("security", made["security"]) for route, operation in operations(made).items()}
    assert security.pop(("/health", "get")) == []
    assert all(required == [{"bearer": []}] for required in security.values())
    assert made["securityDefinitions"]["bearer"] | {"description": ""} == {
        "type": "oauth2",
        "flow": "implicit",
        "authorizationUrl": "",
        "description": "",
        "x-google-issuer": VALUES["jwt_issuer"],
        "x-google-jwks_uri": VALUES["jwt_jwks_uri"],
        "x-google-audiences": VALUES["jwt_audiences"],
        "x-google-jwt-locations": [{"header": "Authorization", "value_prefix": "Bearer "}],
    }


def test_refusals_are_problem_documents_with_their_headers(made: Document) -> None:
    """As in the contract, though each is written out where it is named."""
    for operation in operations(made).values():
        assert operation["produces"] == ["application/json", "application/problem+json"]
        for status, answer in operation["responses"].items():
            refusal = document()["components"]["responses"].get(status, {})
            assert answer["description"] == refusal.get("description", answer["description"])
            assert (answer["schema"] == {"$ref": "#/definitions/Problem"}) == (status >= "400")
            if status >= "400":
                assert answer.get("headers", {}).keys() == refusal.get("headers", {}).keys()


def models() -> dict[str, tuple[type[BaseModel], Any]]:
    found = {name: item for module in (answers, contract) for name, item in vars(module).items()}
    return {
        name: (found[name], "validation" if name == "ExportRequest" else "serialization")
        for name in gateway_document(document(), VALUES)["definitions"]
        if issubclass(found[name], BaseModel)
    }


def test_the_definitions_are_the_models(made: Document) -> None:
    """The same fields, the same required, the same bounds, and null where null may be."""
    for name, (model, mode) in models().items():
        schema, definition = model.model_json_schema(mode=mode), made["definitions"][name]
        assert definition["properties"].keys() == schema["properties"].keys(), name
        assert definition.get("required") == schema.get("required"), name
        for field, wanted in schema["properties"].items():
            found = definition["properties"][field]
            assert found.get("x-nullable", False) == ({"type": "null"} in wanted.get("anyOf", [])), (name, field)
            assert [found.get(bound) for bound in ("pattern", "minimum", "maxLength")] == [
                next((item[bound] for item in [wanted, *wanted.get("anyOf", [])] if bound in item), None)
                for bound in ("pattern", "minimum", "maxLength")
            ], (name, field)
    assert {"ExportRequest", "ExportStatus", "ExportPage", "Submitted", "Health", "Problem"} <= models().keys()
    assert made["definitions"]["State"]["enum"] == [state.value for state in contract.State]


FIELD = ("components", "schemas", "Failure", "properties", "code")
PARAMETERS = ("paths", "/exports", "get", "parameters")
HEALTH = ("paths", "/health", "get")
SCHEMAS: dict[str, tuple[Document, Document]] = {
    "const": ({"const": 3}, {"enum": [3]}),
    "null or text": ({"type": ["string", "null"]}, {"type": "string", "x-nullable": True}),
    "null or model": (
        {"anyOf": [{"$ref": "#/components/schemas/State"}, {"type": "null"}], "default": None},
        {"$ref": "#/definitions/State", "x-nullable": True},
    ),
    "exclusive": (
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 1, "exclusiveMaximum": True},
    ),
    "examples": ({"type": "string", "examples": ["a", "b"]}, {"type": "string", "example": "a"}),
    "map": (
        {"type": "object", "additionalProperties": {"const": 1}},
        {"type": "object", "additionalProperties": {"enum": [1]}},
    ),
}


def changed(place: tuple[str, ...], value: Any) -> Document:
    """The contract with something else in one place."""
    made = copy.deepcopy(document())
    node = made
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return made


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_a_newer_schema_says_an_older_one_says_too(name: str) -> None:
    """In Swagger 2.0's words."""
    schema, wanted = SCHEMAS[name]
    made = gateway_document(changed(FIELD, schema), VALUES)
    assert made["definitions"]["Failure"]["properties"]["code"] == wanted
    made["securityDefinitions"]["bearer"]["authorizationUrl"] = VALUES["jwt_issuer"]
    assert list(OpenAPIV2SpecValidator(made).iter_errors()) == []


SCHEME = {"type": "http", "scheme": "bearer"}
TEXT = {"type": "string"}
UNTRANSLATABLE: dict[str, tuple[tuple[str, ...], Any]] = {
    "a choice": (FIELD, {"oneOf": [TEXT, {"type": "integer"}]}),
    "another choice": (FIELD, {"anyOf": [TEXT, {"type": "integer"}, {"type": "null"}]}),
    "two types": (FIELD, {"type": ["string", "integer"]}),
    "null alone": (FIELD, {"type": "null"}),
    "names of fields": (FIELD, {"type": "object", "propertyNames": {"pattern": "^a"}}),
    "fields by pattern": (FIELD, {"type": "object", "patternProperties": {"^a": TEXT}}),
    "a tuple": (FIELD, {"type": "array", "prefixItems": [TEXT]}),
    "anything": (FIELD, True),
    "two bounds": (FIELD, {"type": "integer", "minimum": 0, "exclusiveMinimum": 1}),
    "more beside a reference": (FIELD, {"$ref": "#/components/schemas/State", "default": "queued"}),
    "a reference elsewhere": (FIELD, {"$ref": "https://example.com/schema.json"}),
    "a cookie": (PARAMETERS, [{"name": "a", "in": "cookie", "schema": TEXT}]),
    "a parameter that may be null": (
        PARAMETERS,
        [{"name": "a", "in": "query", "schema": {"type": ["string", "null"]}}],
    ),
    "a style": (PARAMETERS, [{"name": "a", "in": "query", "style": "deepObject", "schema": TEXT}]),
    "two media types": ((*HEALTH, "responses"), {"200": {"content": {"a/b": {"schema": TEXT}, "a/c": {}}}}),
    "an answer that is not there": ((*HEALTH, "responses"), {"404": {"$ref": "#/components/responses/499"}}),
    "another name": ((*HEALTH, "operationId"), "is healthy"),
    "callbacks": ((*HEALTH, "callbacks"), {}),
    "a method": (("paths", "/health", "trace"), {}),
    "half a segment": (("paths", "/exports/{a}.json"), {}),
    "a key": (("components", "securitySchemes"), {"key": {"type": "apiKey", "in": "header", "name": "X-Key"}}),
    "two issuers": (("components", "securitySchemes"), {"a": SCHEME, "b": SCHEME}),
    "webhooks": (("webhooks",), {}),
}


@pytest.mark.parametrize("name", UNTRANSLATABLE)
def test_what_cannot_be_said_is_an_error(name: str) -> None:
    """Never left out in silence; and the message says where."""
    place, value = UNTRANSLATABLE[name]
    with pytest.raises(UntranslatableError) as error:
        gateway_document(changed(place, value), VALUES)
    below = "/".join(("#", *place))
    beside = f"{'/'.join(('#', *place[:-1]))}: no rule says what {place[-1]!r} "
    assert str(error.value).startswith((below, beside))


def keys(node: Any) -> set[str]:
    if isinstance(node, dict):
        return set(node).union(*(keys(value) for value in node.values()))
    return set().union(*(keys(item) for item in node)) if isinstance(node, list) else set()


def test_nothing_is_left_out_that_is_not_there() -> None:
    """Each exemption is for something in the contract, has its reason, and what it names is gone."""
    assert {key for _, key in DROPPED} <= keys(document())
    assert all(reason.endswith(".") for reason in DROPPED.values())
    gone = {key for kind, key in DROPPED if kind not in ("components", "header")}
    assert not gone & keys(swagger(document()))
