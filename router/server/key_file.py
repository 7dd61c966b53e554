"""The file with the API keys of the data port: its form, and the keys that it holds now."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, SecretStr, StringConstraints, ValidationError

from router.core.rates import UNLIMITED, RateLimiter, Rates
from router.server.affinity import MAX_NAME
from runtime.logs import EventLogger

logger = EventLogger(__name__)

MAX_BYTES = 2**20
"""Largest file, which is also the largest Secret."""
SHORTEST = 16
"""Characters of a key at least: from shorter ones, a digest is no protection."""
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's, where PyYAML is built with it, takes a tenth of the time."""

Rate = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]


class KeyFileError(ValueError):
    """The file cannot be used; the message says where and why, and quotes nothing of what it holds."""


class _Entry(BaseModel):
    """One key in the file, as docs/security.md describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    key: SecretStr | None = None
    sha256: Annotated[str, StringConstraints(to_lower=True, pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    tenant: Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME)]
    priority: Annotated[int, Field(ge=-999_999_999, le=999_999_999)] | None = None
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None
    expires: AwareDatetime | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    keys: tuple[_Entry, ...]


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of one key: never the key itself."""

    digest: bytes
    """SHA-256 of the key."""
    tenant: str
    priority: int | None = None
    """None: what a request states counts."""
    rates: Rates = UNLIMITED
    expires: float | None = None
    """Unix time from which it is not valid any more; None: it stays valid."""


def digest(key: bytes) -> bytes:
    """What a key is looked up by."""
    return hashlib.sha256(key).digest()


def parse(data: bytes) -> Mapping[bytes, ApiKey]:
    """The keys in a file in YAML or JSON, by digest. Raises `KeyFileError`."""
    if len(data) > MAX_BYTES:
        raise KeyFileError(f"it has {len(data)} bytes, and {MAX_BYTES} are the most")
    try:
        parsed = _File.model_validate(_loaded(data))
    except ValidationError as error:
        raise KeyFileError("; ".join(_explain(each) for each in error.errors(include_input=False)[:3])) from None
    keys: dict[bytes, ApiKey] = {}
    for number, entry in enumerate(parsed.keys):
        found = _api_key(number, entry)
        if found.digest in keys:
            raise KeyFileError(f"keys[{number}] is the same key as an earlier one")
        keys[found.digest] = found
    return MappingProxyType(keys)


def _loaded(data: bytes) -> object:
    try:
        return yaml.load(data, _LOADER)  # noqa: S506 - a safe loader
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise KeyFileError(f"it is no YAML{line}") from None
    # What makes values of texts raises anything: an AttributeError for `!!timestamp soon`, a KeyError for `!!bool so`.
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise KeyFileError("it is no YAML") from None


def _explain(error: Any) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])
    # A name that is not known may be a key in the wrong place.
    if error["type"] == "extra_forbidden":
        place = place.rpartition(".")[0]
        return f"{place.lstrip('.') or 'the file'} has a field that is not known"
    return f"{place.lstrip('.') or 'the file'}: {error['msg']}"


def _api_key(number: int, entry: _Entry) -> ApiKey:
    if (entry.key is None) == (entry.sha256 is None):
        raise KeyFileError(f"keys[{number}] needs either key or sha256")
    if entry.sha256 is not None:
        found = bytes.fromhex(entry.sha256)
    else:
        key = entry.key.get_secret_value() if entry.key is not None else ""
        if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
            raise KeyFileError(
                f"keys[{number}].key must have {SHORTEST} characters or more, printable ASCII without spaces"
            )
        found = digest(key.encode())
    rates = Rates(entry.requests_per_minute, entry.tokens_per_minute)
    return ApiKey(found, entry.tenant, entry.priority, rates, _unix(entry.expires))


def _unix(time: datetime | None) -> float | None:
    return time.timestamp() if time is not None else None


class KeyFile:
    """The keys of a file, which is read again every `interval` seconds. A file that cannot be used replaces nothing:
    the last good keys stay. `clock` times the rates; what a key has used of them outlives a change of the file."""

    def __init__(self, path: Path, clock: Callable[[], float], interval: float = 1.0) -> None:
        """Raises `KeyFileError`."""
        self._path = path
        self._clock = clock
        self._interval = interval
        self._read_last = b""
        self.problem = ""
        """Why the file as it is now cannot be used; empty: it is used."""
        self.keys: Mapping[bytes, tuple[ApiKey, RateLimiter]] = {}
        """By digest."""
        data = self._read()
        self._adopt(parse(data), data)

    def public(self) -> dict[str, object]:
        """What `GET /status` and `GET /ready` show of the file."""
        return {"known": len(self.keys), "healthy": not self.problem, "error": self.problem}

    async def follow(self) -> None:
        """Read the file again and again."""
        while True:
            await asyncio.sleep(self._interval)
            await self.refresh()

    async def refresh(self) -> None:
        """Read the file now, and use it if it has changed."""
        try:
            data = await asyncio.to_thread(self._read)
            if data != self._read_last or self.problem:
                self._adopt(await asyncio.to_thread(parse, data), data)
        except KeyFileError as error:
            if str(error) != self.problem:
                self.problem = str(error)
                logger.error("api_keys_unusable", path=str(self._path), why=self.problem, keys_kept=len(self.keys))

    def _read(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                return file.read(MAX_BYTES + 1)
        except OSError as error:
            raise KeyFileError(error.strerror or "it cannot be read") from None

    def _adopt(self, keys: Mapping[bytes, ApiKey], data: bytes) -> None:
        now, known = self._clock(), self.keys
        adopted = {}
        for key in keys.values():
            limiter = known[key.digest][1] if key.digest in known else RateLimiter(key.rates, now)
            limiter.change(key.rates, now)
            adopted[key.digest] = key, limiter
        self.keys, self._read_last, self.problem = adopted, data, ""
        tenants = len({key.tenant for key in keys.values()})
        logger.info("api_keys_loaded", path=str(self._path), keys=len(keys), tenants=tenants)
