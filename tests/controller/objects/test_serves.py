"""Several KVClusters behind one endpoint: what `spec.router.serves` makes of a router.

Not covered: how a router follows several Services (tests/router/discovery/test_merged.py) and serves several models
(tests/router/test_models.py).
"""

from __future__ import annotations

from typing import Any

import pytest

from controller.api.load import ManifestError
from router.settings import Settings
from tests.controller.objects.support import objects


def router_settings(*serves: dict[str, Any]) -> dict[str, str]:
    return objects(router={"serves": list(serves)})["ConfigMap/rag-router"]["data"]


def test_the_routers_follow_the_workers_of_all_and_know_the_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    data = router_settings({"cluster": "mistral", "model": "m/7b", "tokenizer": "org/m"}, {"cluster": "qwen"})
    for name, value in data.items():
        monkeypatch.setenv(name, value)
    settings = Settings.load([])
    assert settings.kubernetes_service == ("rag-worker", "mistral-worker", "qwen-worker")
    assert settings.model_tokenizers == (("m/7b", "org/m"),)


def test_alone_a_router_follows_its_own() -> None:
    data = router_settings()
    assert data["ROUTER_KUBERNETES_SERVICE"] == "rag-worker"
    assert "ROUTER_MODEL_TOKENIZERS" not in data


def test_the_role_lets_a_router_read_every_service_of_the_namespace() -> None:
    (rule,) = objects(router={"serves": [{"cluster": "qwen"}]})["Role/rag-router"]["rules"]
    assert rule == {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}


@pytest.mark.parametrize(
    ("served", "complaint"),
    [
        pytest.param({"cluster": "a", "model": "m"}, "model and tokenizer go together", id="no tokenizer"),
        pytest.param({"cluster": "a", "tokenizer": "t"}, "model and tokenizer go together", id="no model"),
        pytest.param({"cluster": "a", "model": "m=1", "tokenizer": "t"}, "cannot be given to a router", id="a sign"),
        pytest.param({"cluster": "Not a name"}, "spec.router.serves[0].cluster", id="no name of a KVCluster"),
    ],
)
def test_what_cannot_be_is_refused(served: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ManifestError) as refused:
        router_settings(served)
    assert complaint in str(refused.value)
