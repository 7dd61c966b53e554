"""What the router itself answers about models: which there are, and that there is none of a name."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvcache.errors import ApiError, model_not_found, parameter_error
from kvcache.model_card import model_card
from kvcache.ranks import split_rank
from router.core.catalogue import Directory, Served
from router.core.decision import RouteRequest
from router.core.fleet import WorkerStatus

MODELS = "/v1/models"


@dataclass(slots=True)
class Models:
    """Answers by the catalogue of what the workers state. What it cannot know is left to a worker."""

    directory: Directory
    started: int = field(default_factory=lambda: int(time.time()))

    def answer(self, path: str) -> dict[str, Any] | None:
        """The body for `GET /v1/models`, the union of what all workers serve, or for `GET /v1/models/NAME`. None: ask a
        worker, because one of them has not said what it serves. Raises `ApiError` for an unknown name."""
        if not self.directory.stated:
            return None
        served = self.directory.catalogue.served
        if path == MODELS:
            return {"object": "list", "data": [self._card(each) for each in served.values()]}
        name = path.removeprefix(MODELS + "/")
        if name not in served:
            raise model_not_found(name, self.directory.catalogue.models)
        return self._card(served[name])

    def refuse(self, route: RouteRequest) -> ApiError | None:
        """Why no worker can serve the request's model, in vLLM's words; None: one may."""
        known = self.directory.catalogue
        name = route.model
        if not name:
            if route.prompted and known.complete and known.several and known.default is None:
                return parameter_error(
                    f"Several models are served here; name one of {', '.join(known.models)}", "model"
                )
            return None
        if known.complete and name not in known.served and name not in known.missing:
            return model_not_found(name, known.models)
        return None

    def _card(self, served: Served) -> dict[str, Any]:
        """A model as vLLM lists it. The router does not know from where it was loaded: `root` is its name."""
        return model_card(
            served.name,
            created=self.started,
            root=served.name if served.adapter else served.model,
            parent=served.model if served.adapter else None,
            max_model_len=None if served.adapter else served.max_model_len,
        )


def served_models(workers: Sequence[WorkerStatus]) -> list[dict[str, Any]]:
    """For `GET /status`: each model that workers serve, with its adapters and the number of pods that have each.
    Workers that have not said what they serve are left out; the ranks of a pod count once."""
    models: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for worker in workers:
        address = split_rank(worker.url)[0]
        if not worker.model or address in seen:
            continue
        seen.add(address)
        page = models.setdefault(
            worker.model,
            {"name": worker.model, "names": [], "workers": 0, "ready": 0, "matching": 0, "adapters": {}, "missing": {}},
        )
        page["names"] = [*dict.fromkeys((*page["names"], *worker.names))]
        page["workers"] += 1
        page["ready"] += worker.ready
        page["matching"] += worker.ready and worker.matching
        for name in worker.adapters:
            page["adapters"][name] = page["adapters"].get(name, 0) + worker.ready
        for name, why in worker.missing_adapters.items():
            page["missing"].setdefault(name, {})[worker.worker_id] = why
    return list(models.values())
