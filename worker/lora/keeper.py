"""Keeps the wanted adapters loaded in one engine, and tells what is loaded and what is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from runtime.logs import EventLogger
from worker.lora.reconciler import Action, AdapterReconciler, Load
from worker.lora.wanted import WantedAdaptersError, read_wanted

logger = EventLogger(__name__)


class AdapterRefusedError(Exception):
    """The engine did not load or unload an adapter; the message is its own, or says that it did not answer."""


class AdapterEngine(Protocol):
    """The part of an engine that this module uses. Both methods raise `AdapterRefusedError`."""

    async def load_adapter(self, name: str, source: str, *, replace: bool) -> None: ...

    async def unload_adapter(self, name: str) -> None: ...


class AdapterKeeper:
    """Reconciles one engine with the adapters that `file` lists; without a file it only tells what the engine has.

    `on_change(names, missing)` is called whenever either has changed: the names of the loaded adapters, and the reason
    for each wanted one that is not loaded.
    """

    def __init__(
        self,
        file: Path | None,
        engine: AdapterEngine,
        on_change: Callable[[tuple[str, ...], Mapping[str, str]], None],
        clock: Callable[[], float],
    ) -> None:
        self._file = file
        self._engine = engine
        self._on_change = on_change
        self._clock = clock
        self._reconciler = AdapterReconciler()
        self.state: tuple[tuple[str, ...], Mapping[str, str]] = ((), {})
        """What `on_change` was told last: the loaded adapters, and the missing ones with the reason of each."""
        self._names: tuple[str, ...] = ()
        self._problem = ""
        self._observed = asyncio.Event()
        self.failures = 0
        """Actions that the engine refused."""

    def observe(self, loaded: Mapping[str, str]) -> None:
        """The engine lists these adapters now: source by name. To be called every second or so."""
        if self._file is not None:
            self._read(self._file)
            self._reconciler.observe(loaded, self._clock())
            self._observed.set()
        self._names = tuple(loaded)
        self._tell()

    async def run(self) -> None:
        """Carry out what is due after each `observe`, one action after another, until cancelled."""
        while True:
            await self._observed.wait()
            self._observed.clear()
            await self.act()

    async def act(self) -> None:
        """Carry out what is due now."""
        for action in tuple(self._reconciler.actions()):
            try:
                await self._carry_out(action)
            except AdapterRefusedError as error:
                self.failures += 1
                self._reconciler.refused(action, str(error), self._clock())
                logger.error(
                    "adapter_refused", adapter=action.name, action=type(action).__name__.lower(), why=str(error)
                )
        self._tell()

    async def _carry_out(self, action: Action) -> None:
        if isinstance(action, Load):
            await self._engine.load_adapter(action.name, action.source, replace=action.replace)
            logger.info("adapter_loaded", adapter=action.name, source=action.source)
        else:
            await self._engine.unload_adapter(action.name)
            logger.info("adapter_unloaded", adapter=action.name)

    def _read(self, file: Path) -> None:
        """A file that cannot be read changes nothing: the last list stays wanted."""
        try:
            self._reconciler.want(read_wanted(file))
            self._problem = ""
        except WantedAdaptersError as error:
            if str(error) != self._problem:
                logger.error("adapters_file_unusable", why=str(error))
            self._problem = str(error)

    def _tell(self) -> None:
        state = self._names, self._reconciler.missing()
        if state != self.state:
            self.state = state
            self._on_change(*state)
