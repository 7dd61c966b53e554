"""The API servers tests run against: the fake one always, a real kube-apiserver with etcd where there is one.

And the rights that are granted and those that are used there: the two are to be the same.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import httpx

from tests.kube.apiserver import FakeApiServer, Logged

ASSETS = "KUBEBUILDER_ASSETS"
"""Environment variable: the folder with the binaries `etcd` and `kube-apiserver`, as envtest has it.

Where `kube-controller-manager` lies beside them, it collects garbage, which an API server alone does not.
"""


class Backend(Protocol):
    """What both offer. `fake` is the fake API server itself, for its faults."""

    real: bool
    url: str
    token: str
    """The administrator's bearer token."""
    collects_garbage: bool
    """Whether what belongs to a deleted object is deleted."""

    @property
    def fake(self) -> FakeApiServer: ...

    @property
    def requests(self) -> list[Logged]:
        """Every request that was answered so far, in order."""
        ...

    async def start(self) -> None:
        """Serve again, as before, after `stop`."""
        ...

    async def stop(self) -> None:
        """End; the objects are kept."""
        ...

    def client(self, user: str = "admin") -> httpx.AsyncClient:
        """A client of the API for a user; close it."""
        ...

    def kubeconfig(self, path: Path, user: str = "admin", namespace: str = "default") -> Path:
        """Write a kubeconfig for a user."""
        ...

    def without_history(self) -> AbstractContextManager[Backend]:
        """The same objects on a server that knows nothing of what happened before."""
        ...


class FakeBackend:
    """The fake API server on the test's event loop."""

    real = False
    collects_garbage = True

    def __init__(self, api: FakeApiServer) -> None:
        self.fake = api
        self.url = api.url
        self.token = api.token("admin")

    @property
    def requests(self) -> list[Logged]:
        return self.fake.requests

    async def start(self) -> None:
        await self.fake.start()

    async def stop(self) -> None:
        await self.fake.stop()

    def client(self, user: str = "admin") -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.fake.token(user)}", "User-Agent": "tests/1"}
        # Plain HTTP: there is nothing to verify, and reading the certificate authorities takes its time.
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30, trust_env=False, verify=False)  # noqa: S501

    def kubeconfig(self, path: Path, user: str = "admin", namespace: str = "default") -> Path:
        return self.fake.kubeconfig(path, user, namespace)

    @contextlib.contextmanager
    def without_history(self) -> Iterator[FakeBackend]:
        self.fake.compact()
        yield self


def available() -> list[str]:
    """The names of the backends there are here."""
    return ["fake", *(["real"] if os.environ.get(ASSETS) else [])]


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
