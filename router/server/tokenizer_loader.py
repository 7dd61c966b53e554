"""Loads the router's tokenizer in the background, trying until it succeeds. Meanwhile the router routes by load."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from kvcache.tokens.tokenizer import Tokenizer
from runtime.backoff import Backoff
from runtime.logs import EventLogger

logger = EventLogger(__name__)

TOKENIZER_BACKOFF = Backoff(2.0, 60.0)
"""Between two attempts to load the tokenizer."""
AWAITED = 10.0
"""Seconds after which a router is ready although its first attempt is not over."""


class TokenizerState(StrEnum):
    """How far the loading has got."""

    LOADING = "loading"
    """The first attempt is under way."""
    LOADED = "loaded"
    FAILED = "failed"
    """The last attempt failed; another one follows."""


class TokenizerEvent(StrEnum):
    """How an attempt to load the tokenizer ended."""

    SUCCEEDED = "attempt succeeded"
    FAILED = "attempt failed"


TOKENIZER_TRANSITIONS: Mapping[tuple[TokenizerState, TokenizerEvent], TokenizerState] = {
    (TokenizerState.LOADING, TokenizerEvent.SUCCEEDED): TokenizerState.LOADED,
    (TokenizerState.LOADING, TokenizerEvent.FAILED): TokenizerState.FAILED,
    (TokenizerState.FAILED, TokenizerEvent.SUCCEEDED): TokenizerState.LOADED,
    (TokenizerState.FAILED, TokenizerEvent.FAILED): TokenizerState.FAILED,
}


@dataclass(frozen=True, slots=True)
class TokenizerStatus:
    """What `GET /status` shows, to the controller and to people."""

    name: str
    state: TokenizerState
    fingerprint: str = ""
    error: str = ""
    """While FAILED: what went wrong and how to mend it."""

    def public(self) -> dict[str, Any]:
        """The fields of the JSON object."""
        return asdict(self)


class TokenizerLoader:
    """Calls `load(name)` in a thread until it succeeds, then `adopt` with the result, once."""

    def __init__(
        self,
        name: str,
        load: Callable[[str], Tokenizer],
        adopt: Callable[[Tokenizer], None],
        clock: Callable[[], float],
    ) -> None:
        self._load = load
        self._adopt = adopt
        self._clock = clock
        self._began_at = clock()
        self.status = TokenizerStatus(name, TokenizerState.LOADING)

    @property
    def awaited(self) -> bool:
        """Whether requests should wait for the tokenizer: it is likely to be loaded in a moment."""
        return self.status.state is TokenizerState.LOADING and self._clock() - self._began_at < AWAITED

    def loaded(self, tokenizer: Tokenizer) -> None:
        """The tokenizer has been loaded. Raises `KeyError` if one had been before."""
        self._advance(TokenizerEvent.SUCCEEDED, fingerprint=tokenizer.fingerprint)
        self._adopt(tokenizer)
        logger.info("tokenizer_loaded", tokenizer=tokenizer.name, fingerprint=tokenizer.fingerprint)

    async def run(self) -> None:
        """Try until the tokenizer is loaded."""
        failures = 0
        while self.status.state is not TokenizerState.LOADED:
            try:
                tokenizer = await asyncio.to_thread(self._load, self.status.name)
            except Exception as error:  # noqa: BLE001  # hubs, proxies and parsers fail in ways of their own
                self._failed(str(error) or repr(error))
                failures += 1
                await asyncio.sleep(TOKENIZER_BACKOFF.delay(failures))
            else:
                self.loaded(tokenizer)

    def _failed(self, why: str) -> None:
        if why != self.status.error:
            logger.error("tokenizer_failed", why=why, consequence="requests are routed by load only")
        self._advance(TokenizerEvent.FAILED, error=why)

    def _advance(self, event: TokenizerEvent, **fields: str) -> None:
        """Every change of state. `fields` are those of the new `TokenizerStatus`."""
        state = TOKENIZER_TRANSITIONS[self.status.state, event]
        self.status = TokenizerStatus(self.status.name, state, **fields)
