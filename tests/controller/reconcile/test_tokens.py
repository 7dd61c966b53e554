"""The tokens that the controller shows: how a Secret is made once, read seldom, and followed through a rotation.

Not covered: a real API server (tests/kube/operator/test_management_token).
"""

from __future__ import annotations

import base64
from typing import Any

import pytest

from controller.kube.kinds import Kind
from controller.objects.names import Object
from controller.reconcile.tokens import DOUBTED, FRESH, SecretTokens, TokensUnknownError
from controller.reconcile.writer import NameTakenError
from runtime.kube.errors import KubeApiError

SECRET = ("ns", "rag-router-management")
OLD, NEW = "the-token-of-today", "the-token-of-tomorrow"
MANIFEST = {"metadata": {"namespace": "ns", "name": SECRET[1], "ownerReferences": [{"kind": "KVCluster", "uid": "u"}]}}


def encoded(**tokens: str) -> dict[str, str]:
    return {key: base64.b64encode(value.encode()).decode() for key, value in tokens.items()}


class Server:
    """An API server with at most one Secret, and with what it refuses."""

    def __init__(self) -> None:
        self.secret: Object | None = None
        self.reads = 0
        self.refuses: KubeApiError | None = None

    def holds(self, *owners: Object, **tokens: str) -> None:
        metadata = {"name": SECRET[1], "namespace": "ns", "ownerReferences": list(owners)}
        self.secret = {"metadata": metadata, "data": encoded(**tokens)}

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        assert (kind.name, namespace, name) == ("Secret", *SECRET)
        self.reads += 1
        if self.refuses is not None:
            raise self.refuses
        return self.secret

    async def create(self, path: str, manifest: Object) -> None:
        assert path == "/api/v1/namespaces/ns/secrets"
        if self.secret is not None:
            raise KubeApiError(409, "AlreadyExists", "exists")
        self.secret = manifest


class World:
    def __init__(self) -> None:
        self.now, self.server = 0.0, Server()
        self.tokens = SecretTokens(self.server, lambda: self.now, new_token=lambda: NEW)  # type: ignore[arg-type]


async def test_a_secret_is_made_once_with_a_token_of_its_own() -> None:
    it = World()
    assert await it.tokens.is_missing(MANIFEST)
    await it.tokens.create(MANIFEST)
    assert it.server.secret == {**MANIFEST, "data": encoded(token=NEW)}
    assert await it.tokens.of(SECRET) == (NEW,)
    assert not await it.tokens.is_missing(MANIFEST)


async def test_one_that_exists_is_never_overwritten() -> None:
    it = World()
    it.server.holds(token=OLD)
    await it.tokens.create(MANIFEST)
    assert await it.tokens.of(SECRET) == (OLD,)


async def test_another_refusal_is_told() -> None:
    it = World()
    it.server.refuses = KubeApiError(403, "Forbidden", "no")
    with pytest.raises(KubeApiError):
        await it.tokens.is_missing(MANIFEST)


async def test_one_that_was_deleted_is_noticed() -> None:
    it = World()
    await it.tokens.create(MANIFEST)
    assert not await it.tokens.is_missing(MANIFEST)
    it.server.secret = None
    assert not await it.tokens.is_missing(MANIFEST), "it was seen a moment ago"
    anew = {"metadata": {**MANIFEST["metadata"], "ownerReferences": [{"kind": "KVCluster", "uid": "next"}]}}
    assert await it.tokens.is_missing(anew), "a KVCluster that is made anew is not the one it was seen for"
    it.now += DOUBTED
    assert await it.tokens.is_missing(MANIFEST)


@pytest.mark.parametrize(
    ("owner", "taken"),
    [
        pytest.param({"kind": "KVCluster", "name": "rag", "uid": "older"}, True, id="earlier KVCluster"),
        pytest.param({"kind": "KVCluster", "name": "rag", "uid": "u"}, False, id="this one"),
        pytest.param({"kind": "ExternalSecret", "name": "x", "uid": "e", "controller": True}, False, id="provider"),
    ],
)
async def test_whose_a_secret_is(owner: Object, taken: bool) -> None:
    it = World()
    it.server.holds(owner, token=OLD)
    if taken:
        with pytest.raises(NameTakenError, match="belongs to KVCluster rag"):
            await it.tokens.is_missing(MANIFEST)
    else:
        assert not await it.tokens.is_missing(MANIFEST)


async def test_a_secret_is_read_once_a_minute_and_soon_where_it_is_refused() -> None:
    it = World()
    it.server.holds(token=OLD, next=NEW)
    assert await it.tokens.of(SECRET) == (OLD, NEW)
    it.now += FRESH
    assert await it.tokens.of(SECRET, refused=False) == (OLD, NEW)
    assert it.server.reads == 1
    await it.tokens.of(SECRET, refused=True)
    await it.tokens.of(SECRET, refused=True)
    assert it.server.reads == 2


async def test_a_token_that_was_replaced_is_known_until_the_next_change() -> None:
    it = World()
    it.server.holds(token=OLD)
    await it.tokens.of(SECRET)
    it.server.holds(token=NEW)
    for _ in range(3):
        it.now += FRESH + 1
        assert await it.tokens.of(SECRET) == (NEW, OLD), "routers follow after a minute"


@pytest.mark.parametrize("why", ["gone", "unreadable", "unreachable"])
async def test_what_was_known_holds_while_the_secret_cannot_be_read(why: str) -> None:
    it = World()
    it.server.holds(token=OLD)
    await it.tokens.of(SECRET)
    if why == "gone":
        it.server.secret = None
    elif why == "unreadable":
        it.server.holds(token="short")
    else:
        it.server.refuses = KubeApiError(0, "", "the API server cannot be reached")
    it.now += FRESH + 1
    assert await it.tokens.of(SECRET) == (OLD,)
    assert await it.tokens.of(SECRET) == (OLD,)
    assert it.server.reads == 2, "not again at once"


@pytest.mark.parametrize(
    ("secret", "says"),
    [
        pytest.param(None, "there is no Secret rag-router-management", id="none"),
        pytest.param({"data": {}}, "it holds no token", id="empty"),
        pytest.param({"data": {"token": "?"}}, "its data is no base64", id="no base64"),
        pytest.param({"data": encoded(token="secret words")}, "token 1 must have", id="spaces"),
    ],
)
async def test_why_there_is_no_token(secret: Any, says: str) -> None:
    it = World()
    it.server.secret = secret
    with pytest.raises(TokensUnknownError, match=says) as caught:
        await it.tokens.of(SECRET)
    assert "secret words" not in str(caught.value)


async def test_a_cluster_that_is_gone_is_forgotten() -> None:
    it = World()
    await it.tokens.create(MANIFEST)
    it.tokens.forget(("ns", "rag"))
    it.server.holds(token=OLD)
    assert await it.tokens.of(SECRET) == (OLD,)
