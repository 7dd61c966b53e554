"""Bodies in protobuf, for the few kinds kubectl's typed clients send that way.

Field numbers are those of Kubernetes' published `generated.proto` files. A field that is not in the table and is not
empty makes the body unreadable: an object is never stored with a part missing.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

from tests.kube.apiserver.errors import ApiError

MAGIC = b"k8s\x00"

# Message -> field number -> (name, type). A type is a message's name, `str`, `bytes`, `int`, `bool`, `map` (of text),
# `bytemap`, or `skip`; a leading `*` says that the field is repeated.
_META = {
    1: ("name", "str"), 2: ("generateName", "str"), 3: ("namespace", "str"), 4: ("selfLink", "str"), 5: ("uid", "str"),
    6: ("resourceVersion", "str"), 7: ("generation", "int"), 8: ("creationTimestamp", "skip"), 11: ("labels", "map"),
    12: ("annotations", "map"), 13: ("ownerReferences", "*OwnerReference"), 14: ("finalizers", "*str"),
}  # fmt: skip
_BODY = {1: ("metadata", "ObjectMeta")}
_MESSAGES: dict[str, dict[int, tuple[str, str]]] = {
    "Unknown": {1: ("type", "TypeMeta"), 2: ("raw", "bytes"), 3: ("encoding", "str"), 4: ("contentType", "str")},
    "TypeMeta": {1: ("apiVersion", "str"), 2: ("kind", "str")},
    "ObjectMeta": _META,
    "OwnerReference": {
        1: ("kind", "str"), 3: ("name", "str"), 4: ("uid", "str"), 5: ("apiVersion", "str"), 6: ("controller", "bool"),
        7: ("blockOwnerDeletion", "bool"),
    },
    "Namespace": {**_BODY, 2: ("spec", "skip"), 3: ("status", "skip")},
    "ConfigMap": {**_BODY, 2: ("data", "map"), 3: ("binaryData", "bytemap"), 4: ("immutable", "bool")},
    "Secret": {
        **_BODY, 2: ("data", "bytemap"), 3: ("type", "str"), 4: ("stringData", "map"), 5: ("immutable", "bool"),
    },
    "ServiceAccount": {**_BODY, 4: ("automountServiceAccountToken", "bool")},
    "SelfSubjectAccessReview": {**_BODY, 2: ("spec", "AccessSpec"), 3: ("status", "skip")},
    "AccessSpec": {1: ("resourceAttributes", "ResourceAttributes"), 2: ("nonResourceAttributes", "PathAttributes")},
    "ResourceAttributes": {
        1: ("namespace", "str"), 2: ("verb", "str"), 3: ("group", "str"), 4: ("version", "str"), 5: ("resource", "str"),
        6: ("subresource", "str"), 7: ("name", "str"),
    },
    "PathAttributes": {1: ("path", "str"), 2: ("verb", "str")},
    "SelfSubjectRulesReview": {**_BODY, 2: ("spec", "RulesSpec"), 3: ("status", "skip")},
    "RulesSpec": {1: ("namespace", "str")},
    "SelfSubjectReview": {**_BODY, 2: ("status", "skip")},
    "TokenRequest": {**_BODY, 2: ("spec", "TokenSpec"), 3: ("status", "skip")},
    "TokenSpec": {1: ("audiences", "*str"), 3: ("boundObjectRef", "skip"), 4: ("expirationSeconds", "int")},
    "DeleteOptions": {
        1: ("gracePeriodSeconds", "int"), 2: ("preconditions", "Preconditions"), 3: ("orphanDependents", "bool"),
        4: ("propagationPolicy", "str"), 5: ("dryRun", "*str"),
    },
    "Preconditions": {1: ("uid", "str"), 2: ("resourceVersion", "str")},
    "Eviction": {**_BODY, 2: ("deleteOptions", "DeleteOptions")},
    "Role": {**_BODY, 2: ("rules", "*PolicyRule")},
    "ClusterRole": {**_BODY, 2: ("rules", "*PolicyRule")},
    "PolicyRule": {
        1: ("verbs", "*str"), 2: ("apiGroups", "*str"), 3: ("resources", "*str"), 4: ("resourceNames", "*str"),
        5: ("nonResourceURLs", "*str"),
    },
    "RoleBinding": {**_BODY, 2: ("subjects", "*Subject"), 3: ("roleRef", "RoleRef")},
    "ClusterRoleBinding": {**_BODY, 2: ("subjects", "*Subject"), 3: ("roleRef", "RoleRef")},
    "Subject": {1: ("kind", "str"), 2: ("apiGroup", "str"), 3: ("name", "str"), 4: ("namespace", "str")},
    "RoleRef": {1: ("apiGroup", "str"), 2: ("kind", "str"), 3: ("name", "str")},
    "Deployment": {**_BODY, 2: ("spec", "DeploymentSpec"), 3: ("status", "skip")},
    "DeploymentSpec": {
        1: ("replicas", "int"), 2: ("selector", "LabelSelector"), 3: ("template", "PodTemplate"),
        4: ("strategy", "DeploymentStrategy"),
    },
    "DeploymentStrategy": {1: ("type", "str")},
    "LabelSelector": {1: ("matchLabels", "map")},
    "PodTemplate": {**_BODY, 2: ("spec", "PodSpec")},
    "Pod": {**_BODY, 2: ("spec", "PodSpec"), 3: ("status", "skip")},
    "PodSpec": {
        2: ("containers", "*Container"), 3: ("restartPolicy", "str"), 4: ("terminationGracePeriodSeconds", "int"),
        6: ("dnsPolicy", "str"), 8: ("serviceAccountName", "str"), 10: ("nodeName", "str"),
    },
    "Container": {
        1: ("name", "str"), 2: ("image", "str"), 3: ("command", "*str"), 4: ("args", "*str"), 5: ("workingDir", "str"),
        6: ("ports", "*ContainerPort"), 7: ("env", "*EnvVar"), 8: ("resources", "skip"), 14: ("imagePullPolicy", "str"),
    },
    "ContainerPort": {
        1: ("name", "str"), 2: ("hostPort", "int"), 3: ("containerPort", "int"), 4: ("protocol", "str"),
        5: ("hostIP", "str"),
    },
    "EnvVar": {1: ("name", "str"), 2: ("value", "str")},
}  # fmt: skip


def unreadable(why: str) -> ApiError:
    return ApiError(415, f"the body of the request cannot be read as protobuf here ({why}); send application/json")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire == 2:
            size, at = _varint(data, at)
            yield number, data[at : at + size]
            at += size
        else:
            raise unreadable(f"wire type {wire}")


def _entry(data: bytes) -> tuple[str, bytes]:
    parts = dict(_fields(data))
    key, value = parts.get(1, b""), parts.get(2, b"")
    return (key.decode(), value) if isinstance(key, bytes) and isinstance(value, bytes) else ("", b"")


def _value(kind: str, raw: int | bytes) -> Any:
    if isinstance(raw, int):
        return bool(raw) if kind == "bool" else raw - (1 << 64) if raw >> 63 else raw
    if kind == "str":
        return raw.decode()
    return raw if kind == "bytes" else _message(kind, raw)


def _message(name: str, data: bytes) -> dict[str, Any]:
    table = _MESSAGES[name]
    found: dict[str, Any] = {}
    for number, raw in _fields(data):
        if number not in table:
            if raw:
                raise unreadable(f"field {number} of {name}")
            continue
        field, kind = table[number]
        if kind == "skip":
            continue
        if kind in ("map", "bytemap") and isinstance(raw, bytes):
            key, value = _entry(raw)
            text = value.decode() if kind == "map" else base64.b64encode(value).decode()
            found.setdefault(field, {})[key] = text
        elif kind.startswith("*"):
            found.setdefault(field, []).append(_value(kind[1:], raw))
        elif raw != b"" or kind not in ("str", "bytes"):
            found[field] = _value(kind, raw)
    return found


def decode(data: bytes) -> dict[str, Any]:
    """The object in a protobuf body. Raises `ApiError` 415 for one that cannot be read."""
    if not data.startswith(MAGIC):
        raise unreadable("no envelope")
    try:
        envelope = _message("Unknown", data[len(MAGIC) :])
        kind = envelope["type"].get("kind", "")
        if kind not in _MESSAGES:
            raise unreadable(f"kind {kind}")
        return {**envelope["type"], **_message(kind, envelope.get("raw", b""))}
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise unreadable(f"malformed: {error}") from None
