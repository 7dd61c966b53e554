"""The messages of Envoy's ext_proc (envoy/service/ext_proc/v3/external_processor.proto), as far as they are needed.

Described field by field, with Envoy's numbers, and not taken from the package `xds-protos`: that one overwrites modules
of `opentelemetry-proto` with older ones. Fields that are not named here are skipped when a message is read. The values
of enums are numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

_PACKAGE = "kvcluster.ext_proc"
_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "string": _Field.TYPE_STRING, "bytes": _Field.TYPE_BYTES, "bool": _Field.TYPE_BOOL, "enum": _Field.TYPE_INT32,
}  # fmt: skip
_MESSAGES: Mapping[str, str] = {
    "HeaderValue": "string key=1, string value=2, bytes raw_value=3",
    "HeaderMap": "HeaderValue* headers=1",
    "HeaderValueOption": "HeaderValue header=1, enum append_action=3",
    "HeaderMutation": "HeaderValueOption* set_headers=1",
    "NamedStruct": "string key=1, google.protobuf.Struct value=2",
    "Metadata": "NamedStruct* filter_metadata=1",
    "ProtocolConfiguration": "enum request_body_mode=1, enum response_body_mode=2",
    "HttpHeaders": "HeaderMap headers=1, bool end_of_stream=3",
    "HttpBody": "bytes body=1, bool end_of_stream=2",
    "HttpTrailers": "HeaderMap trailers=1",
    "ProcessingRequest": "HttpHeaders request_headers=2|, HttpHeaders response_headers=3|, HttpBody request_body=4|, "
    "HttpBody response_body=5|, HttpTrailers request_trailers=6|, HttpTrailers response_trailers=7|, "
    "Metadata metadata_context=8, ProtocolConfiguration protocol_config=11",
    "StreamedBodyResponse": "bytes body=1, bool end_of_stream=2",
    "BodyMutation": "bytes body=1|, StreamedBodyResponse streamed_response=3|",
    "CommonResponse": "HeaderMutation header_mutation=2, BodyMutation body_mutation=3, bool clear_route_cache=5",
    "HeadersResponse": "CommonResponse response=1",
    "BodyResponse": "CommonResponse response=1",
    "TrailersResponse": "HeaderMutation header_mutation=1",
    "HttpStatus": "enum code=1",
    "ImmediateResponse": "HttpStatus status=1, HeaderMutation headers=2, bytes body=3, string details=5",
    "ProcessingResponse": "HeadersResponse request_headers=1|, HeadersResponse response_headers=2|, "
    "BodyResponse request_body=3|, BodyResponse response_body=4|, TrailersResponse request_trailers=5|, "
    "TrailersResponse response_trailers=6|, ImmediateResponse immediate_response=7|, "
    "google.protobuf.Struct dynamic_metadata=8",
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


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="kvcluster/ext_proc.proto", package=_PACKAGE, syntax="proto3")
    file.dependency.append("google/protobuf/struct.proto")
    for name, fields in _MESSAGES.items():
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
                field.type_name = f".{kind}" if "." in kind else f".{_PACKAGE}.{kind}"
    pool = descriptor_pool.Default()
    if struct_pb2.DESCRIPTOR.name != file.dependency[0]:
        raise RuntimeError("google.protobuf names its file of Struct differently")
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


_found = _classes()
HeaderValue, HeaderValueOption, HeaderMutation = (
    _found[name] for name in ("HeaderValue", "HeaderValueOption", "HeaderMutation")
)
HeaderMap, Metadata, NamedStruct = (_found[name] for name in ("HeaderMap", "Metadata", "NamedStruct"))
ProtocolConfiguration, HttpHeaders, HttpBody, HttpTrailers, ProcessingRequest = (
    _found[name] for name in ("ProtocolConfiguration", "HttpHeaders", "HttpBody", "HttpTrailers", "ProcessingRequest")
)
StreamedBodyResponse, BodyMutation, CommonResponse = (
    _found[name] for name in ("StreamedBodyResponse", "BodyMutation", "CommonResponse")
)
HeadersResponse, BodyResponse, TrailersResponse, HttpStatus, ImmediateResponse, ProcessingResponse = (
    _found[name]
    for name in (
        "HeadersResponse", "BodyResponse", "TrailersResponse", "HttpStatus", "ImmediateResponse", "ProcessingResponse",
    )
)  # fmt: skip
