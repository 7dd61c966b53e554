"""The router's tokenizer, loaded beside its work: a router without one serves by load and goes on trying."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from kvcache.tokens.tokenizer import Tokenizer
from runtime.backoff import Backoff
from runtime.logs import event

logger = logging.getLogger(__name__)

TOKENIZER_BACKOFF = Backoff(2.0, 60.0)
"""Between two attempts to load the tokenizer."""
AWAITED = 10.0
"""Seconds after which a router is ready though its first attempt is not over."""


class TokenizerState(StrEnum):
    """Where the loading stands."""

    LOADING = "loading"
    """The first attempt is under way."""
    LOADED = "loaded"
    FAILED = "failed"
    """The last attempt failed; another one follows."""


@dataclass(frozen=True, slots=True)
class TokenizerStatus:
    """For `/status` and the controller."""

    name: str
    state: TokenizerState
    fingerprint: str = ""
    error: str = ""
    """What went wrong and what to do about it, while FAILED."""

    def public(self) -> dict[str, Any]:
        """As JSON shows it."""
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
        """Whether it is worth waiting for: a moment more, and prompts can be matched."""
        return self.status.state is TokenizerState.LOADING and self._clock() - self._began_at < AWAITED

    def loaded(self, tokenizer: Tokenizer) -> None:
        """It is there."""
        self.status = TokenizerStatus(self.status.name, TokenizerState.LOADED, tokenizer.fingerprint)
        self._adopt(tokenizer)
        event(logger, logging.INFO, "tokenizer_loaded", tokenizer=tokenizer.name, fingerprint=tokenizer.fingerprint)

    async def run(self) -> None:
        """Try until it is loaded."""
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
            event(logger, logging.ERROR, "tokenizer_failed", why=why, consequence="requests are routed by load only")
        self.status = TokenizerStatus(self.status.name, TokenizerState.FAILED, error=why)
