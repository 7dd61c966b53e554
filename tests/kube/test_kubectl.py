"""kubectl against the API server, fake and (where there is one) real: what a person at a terminal does.

Not covered: commands that no document of ours names and that ask for more than is modelled (`create` from flags,
`auth`, `get --watch`, deletion in the foreground); KVClusters (tests/kube/operator/test_kubectl_product.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.kube.backends import Backend
from tests.kube.kubectl import Tool, kubectl_binaries, parameters
from tests.kube.samples import config_map, deployment, pod, widget

pytestmark = pytest.mark.process


@pytest.fixture(params=parameters(kubectl_binaries()))
async def kubectl(request: pytest.FixtureRequest, api: Backend, widgets: str, ns: str, tmp_path: Path) -> Tool:
    """kubectl as administrator, in a namespace of the test's own; widgets are served."""
    return Tool(request.param, api.kubeconfig(tmp_path / "kubeconfig", namespace=ns), tmp_path)


async def test_apply_on_the_clients_side(kubectl: Tool) -> None:
    assert "widget.conformance.example.dev/a created" in await kubectl.apply(widget(args=["x"]))
    assert "unchanged" in await kubectl.apply(widget(args=["x"]))
    assert "configured" in await kubectl.apply(widget())
    obj = yaml.safe_load(await kubectl("get", "wd", "a", "-o", "yaml"))
    assert "args" not in obj["spec"]
    assert "kubectl.kubernetes.io/last-applied-configuration" in obj["metadata"]["annotations"]


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


async def test_what_is_not_valid_is_refused_with_the_field_named(kubectl: Tool) -> None:
    body = yaml.safe_dump(widget(workers={"replicas": -1}, min=9, max=3))
    ran = await kubectl.run("apply", "-f", "-", stdin=body)
    assert ran.code != 0
    assert "spec.workers.replicas" in ran.err
    assert "min exceeds max" in ran.err
    ran = await kubectl.run("apply", "-f", "-", stdin=yaml.safe_dump(widget(colour="red")))
    assert ran.code != 0
    assert 'unknown field "spec.colour"' in ran.err


async def test_get_prints_the_columns(kubectl: Tool) -> None:
    await kubectl.apply(widget())
    status = '{"status":{"conditions":[{"type":"Ready","status":"True"}]}}'
    await kubectl("patch", "wd", "a", "--subresource=status", "--type=merge", "-p", status)
    head, row = (await kubectl("get", "wd")).splitlines()
    assert head.split() == ["NAME", "MODEL", "WORKERS", "READY", "AGE"]
    assert row.split()[:4] == ["a", "gpt2", "2", "True"]
    assert "MODE" in (await kubectl("get", "wd", "-o", "wide")).splitlines()[0]
    await kubectl.apply(deployment())
    everything = await kubectl("get", "all")
    assert "deployment.apps/web" in everything
    assert "widget.conformance.example.dev/a" in everything


async def test_explain_reads_the_definition(kubectl: Tool) -> None:
    text = await kubectl("explain", "widgets.spec.model")
    assert "The model to serve." in text
    assert "<string>" in text
    text = await kubectl("explain", "widget.spec")
    assert "What is wanted." in text
    assert "-required-" in text
    assert "RollingUpdate" in await kubectl("explain", "deployment.spec.strategy")


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


async def test_scale_and_wait(kubectl: Tool) -> None:
    await kubectl.apply(widget(), deployment())
    assert "scaled" in await kubectl("scale", "wd/a", "--replicas=5")
    assert await kubectl("get", "wd", "a", "-o", "jsonpath={.spec.workers.replicas}") == "5"
    await kubectl("wait", "--for=jsonpath={.spec.workers.replicas}=5", "wd/a", "--timeout=20s")
    ran = await kubectl.run("wait", "--for=condition=Ready", "wd/a", "--timeout=1s")
    assert ran.code != 0


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


async def test_diff_shows_what_apply_would_do(kubectl: Tool) -> None:
    await kubectl.apply(widget())
    body = yaml.safe_dump(widget(min=4))
    for flags in ((), ("--server-side", "--force-conflicts")):
        ran = await kubectl.run("diff", *flags, "-f", "-", stdin=body)
        assert ran.code == 1, ran.err
        assert "+  min: 4" in ran.out
    same = await kubectl.run("diff", "-f", "-", stdin=yaml.safe_dump(widget()))
    assert same.code == 0, same.out


async def test_delete(kubectl: Tool) -> None:
    await kubectl.apply(config_map("c"), widget())
    assert 'configmap "c" deleted' in await kubectl("delete", "cm", "c")
    assert "NotFound" in (await kubectl.run("get", "cm", "c")).err
    await kubectl("delete", "wd", "--all")
    await kubectl("delete", "crd", "widgets.conformance.example.dev")
    assert (await kubectl.run("get", "wd")).code != 0
