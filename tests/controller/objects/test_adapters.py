"""LoRA adapters of a manifest: its rules, the objects and flags that follow, and the settings of local processes.

Not covered: how workers and agents keep them loaded (tests/worker), and the status (tests/controller/status).
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from controller.api.load import ManifestError, validate_manifest
from controller.local.desired_processes import Addresses, desired_processes
from controller.objects.config import ADAPTERS_FOLDER
from controller.process_settings import lora_settings
from tests.controller.objects.support import containers, objects

SQL, LAW = {"name": "sql", "source": "acme/sql"}, {"name": "law", "source": "/models/law", "rank": 64}


def manifest(adapters: list[dict[str, Any]], **spec: Any) -> dict[str, Any]:
    content = {"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": "rag"}}
    return content | {"spec": {"model": {"name": "m", "adapters": adapters, **spec.pop("model", {})}, **spec}}


@pytest.mark.parametrize(
    ("adapters", "spec", "complaint"),
    [
        pytest.param([SQL, SQL], {}, 'spec.model.adapters[1].name: "sql": is given twice', id="twice"),
        pytest.param([{**SQL, "name": "m"}], {}, "is a name of the model itself", id="the model's name"),
        pytest.param([SQL], {"model": {"servedNames": ["x", "sql"]}}, "is a name of the model itself", id="served"),
        pytest.param([{**SQL, "rank": 7}], {}, "spec.model.adapters[0].rank", id="a rank that vLLM does not take"),
        pytest.param([{"name": "sql"}], {}, "spec.model.adapters[0].source", id="no source"),
        pytest.param([{**SQL, "name": ""}], {}, "spec.model.adapters[0].name", id="no name"),
        pytest.param([], {"engine": {"args": ["--enable-lora"]}}, "is set by spec.model.adapters", id="a flag"),
        pytest.param([], {"engine": {"args": ["--max-loras=2"]}}, "is set by spec.engine.maxLoras", id="another flag"),
    ],
)
def test_a_list_that_cannot_be_is_refused(adapters: list[dict[str, Any]], spec: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ManifestError) as refused:
        validate_manifest(manifest(adapters, **spec))
    assert complaint in str(refused.value)


def test_a_name_that_is_loaded_but_not_served_is_free() -> None:
    assert validate_manifest(manifest([{**SQL, "name": "m"}], model={"servedNames": ["x"]}))


@pytest.mark.parametrize(("adapters", "slots"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
def test_places_in_a_batch_grow_in_steps(adapters: int, slots: int) -> None:
    listed = [{"name": f"a{index}", "source": "x"} for index in range(adapters)]
    assert lora_settings(validate_manifest(manifest(listed)).spec)["max-loras"] == slots
    assert lora_settings(validate_manifest(manifest(listed, engine={"maxLoras": 3})).spec)["max-loras"] == 3


@pytest.mark.parametrize("engine", ["emulator", "vllm"])
def test_the_list_is_a_mounted_file_whose_change_rolls_nothing(engine: str) -> None:
    def made(*adapters: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return objects(model={"name": "m", "adapters": list(adapters)}, engine={"type": engine})

    first, second = made(SQL, LAW), made(SQL, {**LAW, "name": "poems"})
    listed = json.loads(first["ConfigMap/rag-worker-adapters"]["data"]["adapters.json"])
    assert listed == [{"name": "sql", "source": "acme/sql"}, {"name": "law", "source": "/models/law"}]
    assert first["ConfigMap/rag-worker-adapters"] != second["ConfigMap/rag-worker-adapters"]
    assert first["Deployment/rag-worker"] == second["Deployment/rag-worker"]
    assert "ConfigMap/rag-worker-adapters" not in made()
    pod = first["Deployment/rag-worker"]["spec"]["template"]["spec"]
    (volume,) = [each for each in pod["volumes"] if each["name"] == "kvcluster-adapters"]
    assert volume["configMap"] == {"name": "rag-worker-adapters"}
    reader = containers(first["Deployment/rag-worker"])["agent" if engine == "vllm" else "worker"]
    mount = {"name": "kvcluster-adapters", "mountPath": ADAPTERS_FOLDER, "readOnly": True}
    assert mount in reader["volumeMounts"]
    prefix = "AGENT" if engine == "vllm" else "WORKER"
    assert first["ConfigMap/rag-worker"]["data"][f"{prefix}_ADAPTERS_FILE"] == f"{ADAPTERS_FOLDER}/adapters.json"


def test_vllm_can_load_them_at_run_time() -> None:
    def engine(**model: Any) -> tuple[list[str], dict[str, str]]:
        made = objects(model={"name": "m", **model}, engine={"type": "vllm"})
        container = containers(made["Deployment/rag-worker"])["worker"]
        return container["args"], {each["name"]: each.get("value", "") for each in container["env"]}

    args, env = engine(adapters=[SQL, LAW])
    assert {"--enable-lora", "--max-loras=2", "--max-lora-rank=64"} <= set(args)
    assert env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    args, env = engine()
    assert not [arg for arg in args if "lora" in arg]
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in env
    _, env = engine(adapters=[SQL], env=[{"name": "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "value": "1"}])
    assert env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_local_workers_get_the_same_file() -> None:
    addresses = Addresses(("http://127.0.0.1:1",), "http://127.0.0.1:2", "http://127.0.0.1:3", "/run/adapters.json")
    worker, router = desired_processes(validate_manifest(manifest([SQL, LAW])), addresses)
    assert {"--enable-lora", "--max-loras=2", "--max-lora-rank=64", "--adapters-file=/run/adapters.json"} <= set(
        worker.args
    )
    assert not [arg for arg in router.args if "lora" in arg or "adapter" in arg]
