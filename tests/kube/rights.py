"""Rights that are granted, and rights that are used: the two are to be the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tests.kube.apiserver import Logged

Right = tuple[str, str, str]
"""(verb, API group, resource or resource/subresource)."""


def granted(rules: Iterable[Mapping[str, Any]]) -> set[Right]:
    """What the rules of a Role grant."""
    return {
        (verb, group, resource)
        for rule in rules
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def used(requests: Iterable[Logged], user: str) -> set[Right]:
    """What a user's requests were for, those for no resource apart. An object that apply creates (201) needs the right
    to create it too."""
    rights = set()
    for each in requests:
        if each.user == user and each.resource:
            resource = f"{each.resource}/{each.subresource}" if each.subresource else each.resource
            rights.add((each.verb, each.group, resource))
            if each.verb == "patch" and each.status == 201:
                rights.add(("create", each.group, resource))
    return rights
