"""The messages of Terraform's plugin protocol, version 6, as far as a provider needs them that is only asked to plan.

Source: https://developer.hashicorp.com/terraform/plugin/terraform-plugin-protocol, file tfplugin6.proto. Messages are
described here and not compiled, since the compiler would be one more thing to install.
"""

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "tfplugin6"
_SCALARS = {"bytes": 12, "string": 9, "bool": 8, "int64": 3, "enum": 5}
"""Enumerations are sent as the numbers that they are: on the wire there is no difference."""

_SHAPES: Mapping[str, Mapping[str, tuple[int, str]]] = {
    "DynamicValue": {"msgpack": (1, "bytes")},
    "Attribute": {
        "name": (1, "string"),
        "type": (2, "bytes"),
        "required": (4, "bool"),
        "optional": (5, "bool"),
        "computed": (6, "bool"),
    },
    "Block": {"attributes": (2, "Attribute*"), "block_types": (3, "NestedBlock*")},
    "NestedBlock": {
        "type_name": (1, "string"),
        "block": (2, "Block"),
        "nesting": (3, "enum"),
        "min_items": (4, "int64"),
        "max_items": (5, "int64"),
    },
    "Schema": {"version": (1, "int64"), "block": (2, "Block")},
    "NamedSchema": {"key": (1, "string"), "value": (2, "Schema")},
    "Empty": {},
    "SchemaResponse": {
        "provider": (1, "Schema"),
        "resource_schemas": (2, "NamedSchema*"),
        "data_source_schemas": (3, "NamedSchema*"),
    },
    "Configured": {"config": (2, "DynamicValue")},
    "Named": {"type_name": (1, "string"), "config": (2, "DynamicValue")},
    "Plan": {"type_name": (1, "string"), "proposed_new_state": (3, "DynamicValue")},
    "Value": {"value": (1, "DynamicValue")},
}
METHODS = {
    "GetProviderSchema": ("Empty", "SchemaResponse"),
    "ValidateProviderConfig": ("Empty", "Empty"),
    "ConfigureProvider": ("Configured", "Empty"),
    "ValidateResourceConfig": ("Named", "Empty"),
    "ValidateDataResourceConfig": ("Named", "Empty"),
    "PlanResourceChange": ("Plan", "Value"),
    "ReadDataSource": ("Named", "Value"),
    "StopProvider": ("Empty", "Empty"),
}
"""What each is asked with and answers with, in so far as it is looked at; messages of one shape share a name here."""


def _messages() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name=f"{PACKAGE}.proto", package=PACKAGE, syntax="proto3")
    for name, fields in _SHAPES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            repeated, kind = kind.endswith("*"), kind.removesuffix("*")
            described = message.field.add(name=field, number=number, label=3 if repeated else 1)
            described.type = _SCALARS.get(kind, 11)
            if kind not in _SCALARS:
                described.type_name = f".{PACKAGE}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in _SHAPES}


MESSAGES: Mapping[str, Any] = _messages()
