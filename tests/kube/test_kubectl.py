"""kubectl against the API server, fake and (where there is one) real: what it does to built-in kinds and to conflicts.

Not covered: what it does to KVClusters (tests/kube/operator/test_kubectl_product.py), the commands of the documents
(tests/deploy, tests/kube/e2e/test_headline.py), and commands that ask for more than is modelled (`create` from flags,
`auth`, `get --watch`, deletion in the foreground).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.kube.backends import Backend
from tests.kube.kubectl import Tool, kubectl_binaries, parameters
from tests.kube.samples import deployment, pod, widget

pytestmark = pytest.mark.process


@pytest.fixture(params=parameters(kubectl_binaries()))
async def kubectl(request: pytest.FixtureRequest, api: Backend, widgets: str, ns: str, tmp_path: Path) -> Tool:
    """kubectl as administrator, in a namespace of the test's own; widgets are served."""
    return Tool(request.param, api.kubeconfig(tmp_path / "kubeconfig", namespace=ns), tmp_path)


async def test_apply_on_the_servers_side_and_its_conflicts(kubectl: Tool) -> None:
    flags = ("--server-side",)
    assert "serverside-applied" in await kubectl.apply(widget(min=2), flags=flags)
    await kubectl.apply(widget(min=2), flags=flags)
    body = yaml.safe_dump(widget(min=3))
    clash = await kubectl.run("apply", "--server-side", "--field-manager=other", "-f", "-", stdin=body)
    assert clash.code != 0
    assert 'conflict with "kubectl": .spec.min' in clash.err
    await kubectl.apply(widget(min=3), flags=("--server-side", "--field-manager=other", "--force-conflicts"))


async def test_from_the_clients_side_to_the_servers(kubectl: Tool) -> None:
    await kubectl.apply(deployment(replicas=2))
    await kubectl.apply(deployment(), flags=("--server-side",))
    obj = yaml.safe_load(await kubectl("get", "deployment", "web", "-o", "yaml", "--show-managed-fields"))
    assert obj["spec"]["replicas"] == 1
    managers = {entry["manager"] for entry in obj["metadata"]["managedFields"]}
    assert "kubectl" in managers
    assert "kubectl-client-side-apply" not in managers


async def test_describe(kubectl: Tool, ns: str) -> None:
    await kubectl.apply(widget(), deployment(), pod())
    uid = await kubectl("get", "pod", "p", "-o", "jsonpath={.metadata.uid}")
    event = {
        "apiVersion": "v1", "kind": "Event", "metadata": {"name": "e", "namespace": ns}, "type": "Normal",
        "involvedObject": {"kind": "Pod", "name": "p", "namespace": ns, "uid": uid}, "reason": "Tested",
        "message": "hello",
        "source": {"component": "tests"}, "firstTimestamp": "2026-01-01T00:00:00Z",
        "lastTimestamp": "2026-01-01T00:00:00Z", "count": 1,
    }  # fmt: skip
    await kubectl.apply(event)
    assert ["Model:", "gpt2"] in [line.split() for line in (await kubectl("describe", "wd", "a")).splitlines()]
    assert "RollingUpdateStrategy:  25% max unavailable" in await kubectl("describe", "deployment", "web")
    described = await kubectl("describe", "pod", "p")
    assert "Tested" in described
    assert "hello" in await kubectl("events")


async def test_edits_labels_and_restarts(kubectl: Tool) -> None:
    await kubectl.apply(deployment(), widget())
    await kubectl("label", "deployment", "web", "tier=front")
    await kubectl("annotate", "wd", "a", "note=here")
    await kubectl("set", "image", "deployment/web", "main=web:2")
    await kubectl("set", "env", "deployment/web", "KEY=value")
    await kubectl("rollout", "restart", "deployment/web")
    await kubectl("patch", "wd", "a", "--type=merge", "-p", '{"spec":{"mode":"slow"}}')
    obj = yaml.safe_load(await kubectl("get", "deployment", "web", "-o", "yaml"))
    template = obj["spec"]["template"]
    assert obj["metadata"]["labels"] == {"tier": "front"}
    assert template["spec"]["containers"][0]["image"] == "web:2"
    assert template["spec"]["containers"][0]["env"] == [{"name": "KEY", "value": "value"}]
    assert "kubectl.kubernetes.io/restartedAt" in template["metadata"]["annotations"]
    assert obj["metadata"]["generation"] == 4
    assert await kubectl("get", "wd", "a", "-o", "jsonpath={.spec.mode} {.metadata.annotations.note}") == "slow here"


async def test_edit(kubectl: Tool) -> None:
    await kubectl.apply(widget())
    ran = await kubectl.run("edit", "wd", "a", env={"KUBE_EDITOR": "sed -i s/fast/slow/"})
    assert "edited" in ran.out, ran.err
    assert await kubectl("get", "wd", "a", "-o", "jsonpath={.spec.mode}") == "slow"
