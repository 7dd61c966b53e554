"""Whether a live object still is what was asked for: fields that others set, and that we do not state, do not count."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from controller.objects.names import Object


def covers(live: Any, wanted: Any) -> bool:
    """Whether `live` has everything that `wanted` states.

    Lists whose items have names are compared name by name, as server-side apply merges them; others item by item.
    """
    match wanted:
        case dict():
            return type(live) is dict and all(
                name in live and covers(live[name], value) for name, value in wanted.items()
            )
        case list():
            return type(live) is list and _list_covers(live, wanted)
        case _:
            return bool(live == wanted)


def _list_covers(live: list[Any], wanted: list[Any]) -> bool:
    if wanted and all(type(item) is dict and "name" in item for item in (*wanted, *live)):
        named = {item["name"]: item for item in live}
        return all(item["name"] in named and covers(named[item["name"]], item) for item in wanted)
    return len(live) == len(wanted) and all(map(covers, live, wanted))


def projection(live: Any, wanted: Any) -> Any:
    """What `live` says at the places that `wanted` states: how the server wrote our values down."""
    match wanted:
        case dict() if type(live) is dict:
            return {name: projection(live.get(name), value) for name, value in wanted.items()}
        case list() if type(live) is list:
            if wanted and all(type(item) is dict and "name" in item for item in (*wanted, *live)):
                named = {item["name"]: item for item in live}
                return [projection(named.get(item["name"]), item) for item in wanted]
            if len(live) == len(wanted):
                return [projection(*pair) for pair in zip(live, wanted, strict=True)]
            return live
        case _:
            return live


def fingerprint(live: Object, wanted: Object) -> str:
    """Digest of `projection`: equal as long as nobody changed what we stated."""
    return hashlib.sha256(json.dumps(projection(live, wanted), sort_keys=True).encode()).hexdigest()
