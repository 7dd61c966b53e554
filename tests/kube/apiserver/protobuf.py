"""Protobuf without compiled schemas: a compact notation of messages, and the bodies that helm's and kubectl's clients
send.

Modelled: the kinds of `_KINDS`, with field numbers of Kubernetes' published `generated.proto` files; checked by helm
and kubectl themselves. Not modelled, and refused with 415: other kinds, and fields that are not in the table and not
empty, so that no object is stored with a part missing.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from tests.kube.apiserver.errors import ApiError

MAGIC = b"k8s\x00"

_F = descriptor_pb2.FieldDescriptorProto
_SCALARS = {"i": _F.TYPE_INT64, "u": _F.TYPE_UINT64, "d": _F.TYPE_DOUBLE, "s": _F.TYPE_STRING, "y": _F.TYPE_BYTES,
            "b": _F.TYPE_BOOL, "e": _F.TYPE_INT32}  # fmt: skip
_KINDS = {
    "Unknown": "1typeMeta:TypeMeta 2raw:y 3contentEncoding:s 4contentType:s",
    "TypeMeta": "1apiVersion:s 2kind:s",
    "ObjectMeta": "1name:s 2generateName:s 3namespace:s 4selfLink:s 5uid:s 6resourceVersion:s 7generation:i "
    "8creationTimestamp:Skipped 11*labels:Entry 12*annotations:Entry 14*finalizers:s",
    "Entry": "1key:s 2value:s",
    "Data": "1key:s 2value:y",
    "Skipped": "",
    "Namespace": "1metadata:ObjectMeta 2spec:Skipped 3status:Skipped",
    "Secret": "1metadata:ObjectMeta 2*data:Data 3type:s",
    "DeleteOptions": "1gracePeriodSeconds:i 2preconditions:Preconditions 3orphanDependents:b 4propagationPolicy:s "
    "5*dryRun:s",
    "Preconditions": "1uid:s 2resourceVersion:s",
}


def message_classes(messages: Mapping[str, str]) -> Mapping[str, Any]:
    """Classes of messages, each given by its fields as `<number>[*]<name>:<type>`: `*` for repeated, and for the type
    a message's name or one letter of i(nt64), u(int64), d(ouble), s(tring), y (bytes), b(ool), e(num)."""
    file = descriptor_pb2.FileDescriptorProto(name="read.proto", package="read", syntax="proto2")
    for name, members in messages.items():
        message = file.message_type.add(name=name)
        for member in members.split():
            declared, kind = member.split(":")
            number = declared[: len(declared) - len(declared.lstrip("0123456789"))]
            repeated = declared[len(number)] == "*"
            made = message.field.add(
                name=declared[len(number) + repeated :], number=int(number),
                label=_F.LABEL_REPEATED if repeated else _F.LABEL_OPTIONAL,
            )  # fmt: skip
            if kind in _SCALARS:
                made.type = _SCALARS[kind]
            else:
                made.type, made.type_name = _F.TYPE_MESSAGE, f".read.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    found = {name: pool.FindMessageTypeByName(f"read.{name}") for name in messages}
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}


_CLASSES = message_classes(_KINDS)


def _unreadable(why: str) -> ApiError:
    return ApiError(415, f"the body of the request cannot be read as protobuf here ({why}); send application/json")


def _plain(message: Any) -> dict[str, Any]:
    """A message as JSON has it; empty texts are left out, as Go's encoder always writes them."""
    if unknown := [each.field_number for each in UnknownFieldSet(message) if each.data]:
        raise _unreadable(f"fields {unknown} of {message.DESCRIPTOR.name}")
    found: dict[str, Any] = {}
    for field, value in message.ListFields():
        kind = field.message_type.name if field.message_type is not None else ""
        if kind == "Entry":
            found[field.name] = {each.key: each.value for each in value}
        elif kind == "Data":
            found[field.name] = {each.key: base64.b64encode(each.value).decode() for each in value}
        elif kind and kind != "Skipped":
            found[field.name] = _plain(value)
        elif not kind and value != "":
            found[field.name] = value if isinstance(value, str | int | bytes) else list(value)
    return found


def decode(data: bytes) -> dict[str, Any]:
    """The object in a protobuf body. Raises `ApiError` 415 for one that cannot be read."""
    if not data.startswith(MAGIC):
        raise _unreadable("no envelope")
    try:
        envelope = _CLASSES["Unknown"].FromString(data[len(MAGIC) :])
        kind = envelope.typeMeta.kind
        if kind not in _CLASSES:
            raise _unreadable(f"kind {kind}")
        return {**_plain(envelope.typeMeta), **_plain(_CLASSES[kind].FromString(envelope.raw))}
    except DecodeError as error:
        raise _unreadable(f"malformed: {error}") from None
