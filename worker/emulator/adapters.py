"""The LoRA adapters of an emulated engine: loaded and unloaded with the checks and the words of vLLM 0.32.

An adapter has no weights here. It separates the blocks of its prompts from those of others (`CacheScope.adapter`),
takes one of the engine's `max_loras` places in a batch, and is listed in /v1/models. A folder is read for its rank;
what is no local path counts as a Hugging Face id and is not downloaded.

Checked against a running vLLM 0.32 (`tests/data/vllm/lora.txt`). Not modelled: resolver plugins, `max_cpu_loras`, the
time that loading takes, and that vLLM hashes an adapter's path too, so that one which is replaced from another path
reuses no block.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvcache.errors import ApiError
from runtime.settings import SettingsError
from worker.lora.keeper import AdapterRefusedError
from worker.lora.modules import LoraModule


@dataclass(frozen=True, slots=True)
class Adapter:
    """A loaded adapter."""

    id: int
    """Counted from 1. An adapter that is replaced keeps its own."""
    name: str
    path: str
    """The folder or the Hugging Face id that it was loaded from."""
    parent: str


@dataclass(slots=True)
class Adapters:
    """Those of one engine that serves `names`, the first of which is the parent of every adapter unless a module names
    another. `max_rank` None: LoRA is not enabled. `on_change` is called after every change."""

    names: tuple[str, ...]
    max_rank: int | None = None
    on_change: Callable[[], None] = lambda: None
    known: dict[str, Adapter] = field(default_factory=dict, init=False)
    """Every adapter that was ever loaded, by name, as it was last: its blocks outlive it."""
    _loaded: dict[str, Adapter] = field(default_factory=dict, init=False)
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1), init=False)

    def __contains__(self, name: object) -> bool:
        return name in self._loaded

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._loaded.values())

    def paths(self) -> Mapping[str, str]:
        """Where each loaded adapter comes from, by name."""
        return {adapter.name: adapter.path for adapter in self}

    def load(self, name: str, path: str, *, in_place: bool = False, parent: str | None = None) -> str:
        """Load an adapter. Returns vLLM's answer. Raises `ApiError`."""
        if not name or not path:
            raise _invalid("Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.names:
            raise _invalid(f"The lora adapter '{name}' conflicts with a served base model.")
        if not in_place and name in self._loaded:
            raise _invalid(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True."
            )
        if self.max_rank is None:
            raise _failed("LoRA is not enabled. Use --enable-lora to enable LoRA.")
        rank = _rank(name, path)
        if rank > self.max_rank:
            raise _failed(f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}.")
        loaded = self._loaded.get(name)
        number = next(self._ids) if loaded is None else loaded.id
        parent = parent if parent is not None and parent in self.names else self.names[0]
        self._loaded[name] = self.known[name] = Adapter(number, name, path, parent)
        self.on_change()
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> str:
        """Unload an adapter; its blocks stay cached. Returns vLLM's answer. Raises `ApiError`."""
        if not name:
            raise _invalid("'lora_name' needs to be provided to unload a LoRA adapter.")
        if name not in self._loaded:
            raise ApiError(404, f"The lora adapter '{name}' cannot be found.")
        del self._loaded[name]
        self.on_change()
        return f"Success: LoRA adapter '{name}' removed successfully."


def _rank(name: str, root: str) -> int:
    """The rank that an adapter's folder states, 0 for a Hugging Face id. Raises `ApiError` for a missing folder."""
    path = Path(root).expanduser()
    if not path.is_dir() and not (root.startswith(("/", "~", ".")) or root.count("/") > 1):
        return 0
    try:
        config = json.loads((path / "adapter_config.json").read_bytes())
    except OSError:
        raise ApiError(404, f"Loading lora {name} failed: No adapter found for {root}") from None
    except ValueError as error:
        raise _failed(str(error)) from None
    rank = config.get("r") if isinstance(config, dict) else None
    return rank if isinstance(rank, int) else 0


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, type="InvalidUserInput")


def _failed(why: str) -> ApiError:
    return ApiError(
        500,
        f"Call to add_lora method failed: Worker failed with error '{why}', please check the stack trace above for the "
        "root cause",
    )


@dataclass(frozen=True, slots=True)
class AdapterLoader:
    """The adapters as an `AdapterEngine`."""

    adapters: Adapters

    async def load_adapter(self, name: str, source: str, *, replace: bool) -> None:
        """Raises `AdapterRefusedError`."""
        try:
            self.adapters.load(name, source, in_place=replace)
        except ApiError as error:
            raise AdapterRefusedError(error.message) from None

    async def unload_adapter(self, name: str) -> None:
        """Raises `AdapterRefusedError`."""
        try:
            self.adapters.unload(name)
        except ApiError as error:
            raise AdapterRefusedError(error.message) from None


def load_modules(adapters: Adapters, modules: Iterable[LoraModule]) -> None:
    """Load what `--lora-modules` names. Raises `SettingsError`: vLLM does not start, either."""
    for module in modules:
        try:
            adapters.load(module.name, module.path, parent=module.base_model_name)
        except ApiError as error:
            raise SettingsError(f"--lora-modules: {error.message}") from None
