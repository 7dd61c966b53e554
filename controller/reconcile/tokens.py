"""The tokens that the controller shows at the routers' management ports, and the Secrets that it makes for them."""

from __future__ import annotations

import base64
import contextlib
import secrets
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Protocol

from controller.kube.client import KubeClient
from controller.kube.kinds import KVCLUSTER, SECRET
from controller.objects.management import TOKEN_KEY, own_secret
from controller.objects.names import Object
from controller.reconcile.writer import NameTakenError
from controller.status import raw
from runtime.http.tokens import TokenFile, TokenFileError, decoded
from runtime.kube.errors import KubeApiError

FRESH = 60.0
"""Seconds for which a Secret that was read counts."""
DOUBTED = 5.0
"""The same while a router refuses its tokens, since the Secret may have changed, and for whether it is still there."""
TOKEN_BYTES = 32
"""Of randomness in a token."""

Secret = tuple[str, str]
"""(namespace, name)."""


class TokensUnknownError(RuntimeError):
    """The tokens of a Secret cannot be had; the message says why, and holds none of them."""


class Tokens(Protocol):
    """Knows the tokens of Secrets."""

    async def of(self, secret: Secret, *, refused: bool = False) -> tuple[str, ...]:
        """The tokens to show, the best first. `refused`: those that were given before are refused. Raises
        `TokensUnknownError`."""


def tokens_in(secret: Object) -> tuple[str, ...]:
    """The tokens that a Secret holds. Raises `TokensUnknownError`."""
    try:
        return decoded(raw.mapping(secret, "data"))
    except TokenFileError as error:
        raise TokensUnknownError(f"Secret {raw.name(secret)} cannot be used: {error}") from None


@dataclass(frozen=True, slots=True)
class _Known:
    tokens: tuple[str, ...]
    read_at: float
    before: tuple[str, ...] = ()
    """Tokens of its last other content: a kubelet takes a minute to bring a change to the routers."""


@dataclass(slots=True)
class SecretTokens:
    """Reads Secrets by name, and makes those that are missing. `clock` in seconds."""

    client: KubeClient
    clock: Callable[[], float]
    _: KW_ONLY
    new_token: Callable[[], str] = lambda: secrets.token_urlsafe(TOKEN_BYTES)
    _known: dict[Secret, _Known] = field(default_factory=dict, init=False)
    _seen: dict[Secret, tuple[str, float]] = field(default_factory=dict, init=False)
    """For which KVCluster, by uid, and when a Secret was last seen to exist: one that is made anew takes its name."""

    async def of(self, secret: Secret, *, refused: bool = False) -> tuple[str, ...]:
        """See `Tokens`."""
        known = self._known.get(secret)
        if known is None or self.clock() - known.read_at > (DOUBTED if refused else FRESH):
            try:
                found = await self.client.get(SECRET, *secret)
                if found is None:
                    raise TokensUnknownError(f"there is no Secret {secret[1]}")
                known = self._learn(secret, tokens_in(found))
            except (KubeApiError, TokensUnknownError) as error:
                if known is None:
                    raise TokensUnknownError(f"Secret {secret[1]} cannot be read: {error}") from None
                # What was known may still hold; and what failed is not tried again at once.
                known = self._known[secret] = replace(known, read_at=self.clock())
        return tuple(dict.fromkeys((*known.tokens, *known.before)))

    async def is_missing(self, manifest: Object) -> bool:
        """Whether there is no such Secret. One of an earlier KVCluster of the same name is about to go. Raises
        `NameTakenError` for that, or `KubeApiError`."""
        metadata = manifest["metadata"]
        secret, uid = (metadata["namespace"], metadata["name"]), metadata["ownerReferences"][0]["uid"]
        seen_for, seen_at = self._seen.get(secret, ("", 0.0))
        if seen_for == uid and self.clock() - seen_at < DOUBTED:
            return False
        found = await self.client.get(SECRET, *secret)
        if found is None:
            return True
        if (other := _other_cluster(found, uid)) is not None:
            raise NameTakenError(other)
        with contextlib.suppress(TokensUnknownError):  # routers and their reports say what is wrong with it
            self._learn(secret, tokens_in(found))
        self._seen[secret] = uid, self.clock()
        return False

    async def create(self, manifest: Object) -> None:
        """Make this Secret with a new token, unless there is one of its name. Raises `KubeApiError`."""
        metadata, token = manifest["metadata"], self.new_token()
        data = {TOKEN_KEY: base64.b64encode(token.encode()).decode()}
        try:
            await self.client.create(SECRET.path(metadata["namespace"]), {**manifest, "data": data})
        except KubeApiError as error:
            if error.reason == "AlreadyExists":
                return
            raise
        self._learn((metadata["namespace"], metadata["name"]), (token,))

    def forget(self, cluster: Secret) -> None:
        """The KVCluster of this namespace and name is gone."""
        namespace, name = cluster
        self._known.pop((namespace, own_secret(name)), None)
        self._seen.pop((namespace, own_secret(name)), None)

    def _learn(self, secret: Secret, tokens: tuple[str, ...]) -> _Known:
        before = self._known.get(secret)
        old = () if before is None else before.before if before.tokens == tokens else before.tokens
        known = self._known[secret] = _Known(tokens, self.clock(), old)
        return known


def _other_cluster(secret: Object, uid: str) -> str | None:
    """Which other KVCluster the Secret belongs to, in words. One that belongs to nobody, or to what a person uses to
    provide it, is taken as it is."""
    owners = raw.objects(secret, "metadata", "ownerReferences")
    others = [owner for owner in owners if owner.get("kind") == KVCLUSTER.name and owner.get("uid") != uid]
    return f"belongs to KVCluster {others[0].get('name')} (uid {others[0].get('uid')})" if others else None


@dataclass(frozen=True, slots=True)
class FileTokens:
    """Tokens of a file, the same for every Secret."""

    file: TokenFile

    async def of(self, secret: Secret, *, refused: bool = False) -> tuple[str, ...]:
        """See `Tokens`."""
        return self.file.tokens
