"""The messages that gateways send by Envoy's ext_proc (envoy/service/ext_proc/v3/external_processor.proto), as far as
they are needed. What is answered is in `router.picker.replies`.

Described field by field, with Envoy's numbers, and not taken from the package `xds-protos`: that one overwrites modules
of `opentelemetry-proto` with older ones. Fields that are not named here are skipped when a message is read. The values
of enums are numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "string": _Field.TYPE_STRING, "bytes": _Field.TYPE_BYTES, "bool": _Field.TYPE_BOOL, "enum": _Field.TYPE_INT32,
}  # fmt: skip
MESSAGES: Mapping[str, str] = {
    "HeaderValue": "string key=1, string value=2, bytes raw_value=3",
    "HeaderMap": "HeaderValue* headers=1",
    "NamedStruct": "string key=1, google.protobuf.Struct value=2",
    "Metadata": "NamedStruct* filter_metadata=1",
    "ProtocolConfiguration": "enum request_body_mode=1, enum response_body_mode=2",
    "HttpHeaders": "HeaderMap headers=1, bool end_of_stream=3",
    "HttpBody": "bytes body=1, bool end_of_stream=2",
    "HttpTrailers": "HeaderMap trailers=1",
    "ProcessingRequest": "HttpHeaders request_headers=2|, HttpHeaders response_headers=3|, HttpBody request_body=4|, "
    "HttpBody response_body=5|, HttpTrailers request_trailers=6|, HttpTrailers response_trailers=7|, "
    "Metadata metadata_context=8, ProtocolConfiguration protocol_config=11",
}
"""Fields of each message: type, name and number; `*`: repeated; `|`: one of those of the message."""


class BodyMode(IntEnum):
    """`ProcessingMode.BodySendMode`."""

    NONE = 0
    STREAMED = 1
    BUFFERED = 2
    BUFFERED_PARTIAL = 3
    FULL_DUPLEX_STREAMED = 4


OVERWRITE = 2
"""`HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD`."""


def classes(messages: Mapping[str, str], package: str) -> dict[str, Any]:
    """The classes of messages that are described as in `MESSAGES`, by name."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    file.dependency.append("google/protobuf/struct.proto")
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        if "|" in fields:
            message.oneof_decl.add(name="kind")
        for each in fields.split(", "):
            kind, _, stated = each.partition(" ")
            field_name, _, number = stated.partition("=")
            field = message.field.add(name=field_name, number=int(number.rstrip("|")), label=_Field.LABEL_OPTIONAL)
            if number.endswith("|"):
                field.oneof_index = 0
            if kind.endswith("*"):
                field.label = _Field.LABEL_REPEATED
                kind = kind[:-1]
            if kind in _SCALARS:
                field.type = _SCALARS[kind]
            else:
                field.type = _Field.TYPE_MESSAGE
                field.type_name = f".{kind}" if "." in kind else f".{package}.{kind}"
    pool = descriptor_pool.Default()
    if struct_pb2.DESCRIPTOR.name != file.dependency[0]:
        raise RuntimeError("google.protobuf names its file of Struct differently")
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in messages}


_found = classes(MESSAGES, "kvcluster.ext_proc")
HeaderMap, HeaderValue, HttpBody, HttpHeaders, HttpTrailers, ProcessingRequest, ProtocolConfiguration = (
    _found[name]
    for name in (
        "HeaderMap", "HeaderValue", "HttpBody", "HttpHeaders", "HttpTrailers", "ProcessingRequest",
        "ProtocolConfiguration",
    )
)  # fmt: skip
