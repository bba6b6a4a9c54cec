"""A provider that speaks Terraform's own protocol, so that the real `terraform` validates and plans without Google.

It has the schema of the real ones (`schema.json`), so every argument, block and reference is checked by Terraform
itself. What Google would answer is made up from the names that were asked for, the same every time, so that a plan has
no unknown values. It checks no values as the real provider does, and nothing is ever made.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import msgpack

from infra.local.rpc import serving
from tests.terraform.protocol import MESSAGES, METHODS, PACKAGE

PROJECT_NUMBER = "123456789012"
BILLING_ACCOUNT = "012345-6789AB-CDEF01"
SCHEMA: Mapping[str, Any] = json.loads(Path(__file__).with_name("schema.json").read_text())
_NESTINGS = {"single": 1, "list": 2, "set": 3}
_TYPE = re.compile(r"(required|optional|computed) (?:(list|set|map)\()?(\w+)\)?")

Value = dict[str, Any]


class StandIn:
    """One provider, by its name in the schema."""

    def __init__(self, name: str) -> None:
        self._schema = SCHEMA[name]
        self._project = ""

    def service(self) -> grpc.GenericRpcHandler:
        """What it answers."""
        answers: dict[str, Callable[[Any], Any]] = {
            "GetProviderSchema": self._schemas,
            "ConfigureProvider": self._configure,
            "PlanResourceChange": self._planned,
            "ReadDataSource": self._read,
        }
        handlers = {}
        for name, (asked, answered) in METHODS.items():
            nothing = MESSAGES[answered]
            answer = answers.get(name, lambda request, nothing=nothing: nothing())
            handlers[name] = grpc.unary_unary_rpc_method_handler(
                lambda request, context, answer=answer: answer(request),
                request_deserializer=MESSAGES[asked].FromString,
                response_serializer=nothing.SerializeToString,
            )
        return grpc.method_handlers_generic_handler(f"{PACKAGE}.Provider", handlers)

    def _schemas(self, _: Any) -> Any:
        named = {
            kind: [{"key": name, "value": {"block": _block(block)}} for name, block in self._schema[kind].items()]
            for kind in ("resource", "data")
        }
        return MESSAGES["SchemaResponse"](
            provider={"block": _block(self._schema["provider"])},
            resource_schemas=named["resource"],
            data_source_schemas=named["data"],
        )

    def _configure(self, request: Any) -> Any:
        self._project = _read_value(request.config).get("project", "")
        return MESSAGES["Empty"]()

    def _planned(self, request: Any) -> Any:
        state = _read_value(request.proposed_new_state)
        known = self._known(request.type_name, state)
        return _value({name: known.get(name) if value is None else value for name, value in state.items()})

    def _read(self, request: Any) -> Any:
        found = {"number": PROJECT_NUMBER, "billing_account": BILLING_ACCOUNT}
        return _value({**_read_value(request.config), **found})

    def _known(self, kind: str, state: Value) -> Value:
        """What Google would answer, as far as the deployment refers to it."""
        project, name = self._project, state.get("name")
        account = f"{state.get('account_id')}@{project}.iam.gserviceaccount.com"
        role = f"projects/{project}/roles/{state.get('role_id')}"
        by_kind: dict[str, Value] = {
            "google_service_account": {
                "name": f"projects/{project}/serviceAccounts/{account}",
                "email": account,
                "member": f"serviceAccount:{account}",
            },
            "google_project_iam_custom_role": {"id": role, "name": role},
            "google_pubsub_topic": {"id": f"projects/{project}/topics/{name}"},
            "google_cloud_run_v2_service": {"uri": f"https://{name}-hash-uc.a.run.app"},
            "google_artifact_registry_repository": {"name": state.get("repository_id")},
            "google_monitoring_notification_channel": {"name": f"projects/{project}/notificationChannels/1"},
            "google_api_gateway_api_config": {
                "id": f"projects/{project}/locations/global/apis/{state.get('api')}/configs/1"
            },
            "google_api_gateway_gateway": {"default_hostname": f"{state.get('gateway_id')}-hash.uc.gateway.dev"},
        }
        return {"id": f"{kind}/{name}", "project": project, **by_kind.get(kind, {})}


@contextmanager
def providers() -> Iterator[str]:
    """All of them; yields what `TF_REATTACH_PROVIDERS` has to be, so that Terraform takes them and installs none.

    Source: https://developer.hashicorp.com/terraform/plugin/debugging
    """
    with ExitStack() as stack:
        addresses = {name: stack.enter_context(serving(StandIn(name).service())) for name in SCHEMA}
        yield json.dumps(
            {
                f"registry.terraform.io/hashicorp/{name}": {
                    "Protocol": "grpc",
                    "ProtocolVersion": 6,
                    "Pid": os.getpid(),
                    "Test": True,
                    "Addr": {"Network": "tcp", "String": address},
                }
                for name, address in addresses.items()
            }
        )


def _block(block: Mapping[str, Any]) -> Value:
    attributes = [_attribute(name, told) for name, told in block["attributes"].items()]
    nested = [
        {
            "type_name": name,
            "block": _block(inner),
            "nesting": _NESTINGS[inner["nesting"]],
            "min_items": int(inner["required"]) if inner["nesting"] != "single" else 0,
            "max_items": inner.get("max", 0),
        }
        for name, inner in block["blocks"].items()
    ]
    return {"attributes": attributes, "block_types": nested}


def _attribute(name: str, told: str) -> Value:
    match = _TYPE.fullmatch(told)
    if match is None:
        raise ValueError(f"{name} is {told!r} in schema.json")
    use, collection, kind = match.groups()
    written = json.dumps([collection, kind] if collection else kind).encode()
    # Whether what is optional is computed where it is not set, the packages do not say.
    computed = use != "required"
    return {
        "name": name,
        "type": written,
        "required": use == "required",
        "optional": use == "optional",
        "computed": computed,
    }


def _read_value(value: Any) -> Any:
    return msgpack.unpackb(value.msgpack, strict_map_key=False)


def _value(value: Any) -> Any:
    return MESSAGES["Value"](value={"msgpack": msgpack.packb(value)})
