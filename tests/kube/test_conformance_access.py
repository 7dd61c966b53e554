"""Access control of the API server, fake and (where there is one) real: tokens, roles, bindings, escalation.

Not covered: users and groups as subjects, aggregated roles and access reviews, which are not modelled; the rights
that the chart and the controller grant (tests/deploy/test_install.py, tests/router/kubernetes).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import pytest

from tests.kube.backends import Backend
from tests.kube.calls import apply, ok, patch, refused
from tests.kube.samples import config_map, widget

pytestmark = pytest.mark.process

RBAC = "rbac.authorization.k8s.io"
Rule = dict[str, list[str]]
Grant = Callable[[list[Rule]], Awaitable[None]]

READ_MAPS = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list"]}]


def robot_of(ns: str) -> str:
    return f"system:serviceaccount:{ns}:robot"


async def until_granted(api: Backend, client: httpx.AsyncClient, ns: str, rule: Rule) -> None:
    """A real server's authoriser follows the roles with a delay; the fake one reads them as they are stored."""
    resource, _, subresource = rule["resources"][0].partition("/")
    attributes = {
        "namespace": ns, "verb": rule["verbs"][0], "group": rule["apiGroups"][0], "resource": resource,
        "subresource": subresource, "name": rule.get("resourceNames", [""])[0],
    }  # fmt: skip
    spec = {"user": robot_of(ns), "groups": ["system:authenticated"], "resourceAttributes": attributes}
    path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
    async with asyncio.timeout(30):
        while api.real and not ok(await client.post(path, json={"spec": spec}), 201)["status"]["allowed"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.fixture
def grant(api: Backend, client: httpx.AsyncClient, ns: str) -> Grant:
    """Lets the service account `robot` of the test's namespace do something there."""

    async def granted(rules: list[Rule]) -> None:
        root = f"/apis/{RBAC}/v1/namespaces/{ns}"
        ok(await client.post(f"{root}/roles", json={"metadata": {"name": "robot"}, "rules": rules}), 201)
        binding = {
            "metadata": {"name": "robot"}, "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": "robot"},
            "subjects": [{"kind": "ServiceAccount", "name": "robot", "namespace": ns}],
        }  # fmt: skip
        ok(await client.post(f"{root}/rolebindings", json=binding), 201)
        await until_granted(api, client, ns, rules[-1])

    return granted


@pytest.fixture
async def robot(api: Backend, ns: str) -> AsyncIterator[httpx.AsyncClient]:
    """The client of a service account that may do nothing yet."""
    async with api.client(robot_of(ns)) as client:
        yield client


async def test_a_token_that_is_none_is_refused(client: httpx.AsyncClient, ns: str) -> None:
    answer = await client.get(f"/api/v1/namespaces/{ns}/pods", headers={"Authorization": "Bearer nonsense"})
    assert refused(answer, 401, "Unauthorized")["message"] == "Unauthorized"


async def test_what_is_not_granted_is_forbidden(robot: httpx.AsyncClient, ns: str) -> None:
    status = refused(await robot.get(f"/api/v1/namespaces/{ns}/configmaps/c"), 403, "Forbidden")
    assert status["message"] == (
        f'configmaps "c" is forbidden: User "{robot_of(ns)}" cannot get resource "configmaps" in API group "" in the '
        f'namespace "{ns}"'
    )
    assert status["details"] == {"name": "c", "kind": "configmaps"}
    status = refused(await robot.get("/apis/apps/v1/deployments"), 403, "Forbidden")
    assert status["message"] == (
        f'deployments.apps is forbidden: User "{robot_of(ns)}" cannot list resource "deployments" in API group "apps" '
        "at the cluster scope"
    )


async def test_a_role_grants_in_its_namespace(robot: httpx.AsyncClient, ns: str, grant: Grant) -> None:
    await grant(READ_MAPS)
    ok(await robot.get(f"/api/v1/namespaces/{ns}/configmaps"))
    refused(await robot.post(f"/api/v1/namespaces/{ns}/configmaps", json=config_map()), 403, "Forbidden")
    refused(await robot.get("/api/v1/namespaces/default/configmaps"), 403, "Forbidden")
    refused(await robot.get("/api/v1/configmaps"), 403, "Forbidden")
    refused(await robot.get(f"/api/v1/namespaces/{ns}/secrets"), 403, "Forbidden")
    watch = await robot.get(f"/api/v1/namespaces/{ns}/configmaps", params={"watch": "1"})
    assert 'cannot watch resource "configmaps"' in refused(watch, 403, "Forbidden")["message"]


async def test_discovery_is_for_everybody_who_is_somebody(robot: httpx.AsyncClient, ns: str) -> None:
    for path in ("/api", "/apis", "/version", "/openapi/v3", "/api/v1"):
        ok(await robot.get(path))


async def test_a_cluster_role_grants_everywhere(
    api: Backend, client: httpx.AsyncClient, robot: httpx.AsyncClient, ns: str
) -> None:
    name = f"reader-{ns}"
    role = {"metadata": {"name": name}, "rules": READ_MAPS}
    ok(await client.post(f"/apis/{RBAC}/v1/clusterroles", json=role), 201)
    binding = {
        "metadata": {"name": name}, "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": "robot", "namespace": ns}],
    }  # fmt: skip
    ok(await client.post(f"/apis/{RBAC}/v1/clusterrolebindings", json=binding), 201)
    await until_granted(api, client, ns, READ_MAPS[0])
    ok(await robot.get("/api/v1/configmaps"))
    ok(await robot.get("/api/v1/namespaces/default/configmaps"))


async def test_subresources_are_granted_apart(
    client: httpx.AsyncClient, robot: httpx.AsyncClient, widgets: str, ns: str, grant: Grant
) -> None:
    group = widgets.split("/")[2]
    await grant([
        {"apiGroups": [group], "resources": ["widgets"], "verbs": ["get", "list"]},
        {"apiGroups": [group], "resources": ["widgets/status"], "verbs": ["patch"]},
    ])  # fmt: skip
    ok(await client.post(widgets, json=widget()), 201)
    ok(await patch(robot, f"{widgets}/a/status", {"status": {"ready": 1}}))
    status = refused(await patch(robot, f"{widgets}/a", {"spec": {"min": 2}}), 403, "Forbidden")
    assert 'cannot patch resource "widgets"' in status["message"]
    status = refused(await robot.get(f"{widgets}/a/scale"), 403, "Forbidden")
    assert 'cannot get resource "widgets/scale"' in status["message"]


async def test_rules_may_name_objects(
    client: httpx.AsyncClient, robot: httpx.AsyncClient, ns: str, grant: Grant
) -> None:
    rule = {
        "apiGroups": [""],
        "resources": ["configmaps"],
        "resourceNames": ["mine"],
        "verbs": ["get", "list", "watch"],
    }
    await grant([rule])
    maps = f"/api/v1/namespaces/{ns}/configmaps"
    ok(await client.post(maps, json=config_map("mine")), 201)
    ok(await robot.get(f"{maps}/mine"))
    refused(await robot.get(f"{maps}/other"), 403, "Forbidden")
    refused(await robot.get(maps), 403, "Forbidden")
    found = ok(await robot.get(maps, params={"fieldSelector": "metadata.name=mine"}))
    assert len(found["items"]) == 1


async def test_nobody_grants_what_he_does_not_hold(
    client: httpx.AsyncClient, robot: httpx.AsyncClient, ns: str, grant: Grant
) -> None:
    write = {"apiGroups": [RBAC], "resources": ["roles", "rolebindings"], "verbs": ["create", "patch", "get", "update"]}
    await grant([write, *READ_MAPS])
    root = f"/apis/{RBAC}/v1/namespaces/{ns}"
    role = {"apiVersion": f"{RBAC}/v1", "kind": "Role", "metadata": {"name": "other"}, "rules": READ_MAPS}
    ok(await apply(robot, f"{root}/roles/other", role), 201)
    more = {**role, "rules": [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}]}
    status = refused(await apply(robot, f"{root}/roles/other", more), 403, "Forbidden")
    assert "is attempting to grant RBAC permissions not currently held" in status["message"]
    assert "secrets" in status["message"]
    ok(await client.post(f"{root}/roles", json={**more, "metadata": {"name": "secrets"}}), 201)
    binding = {
        "metadata": {"name": "b"}, "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": "secrets"},
        "subjects": [{"kind": "ServiceAccount", "name": "robot", "namespace": ns}],
    }  # fmt: skip
    refused(await robot.post(f"{root}/rolebindings", json=binding), 403, "Forbidden")
    binding["roleRef"] = {"apiGroup": RBAC, "kind": "Role", "name": "other"}
    ok(await robot.post(f"{root}/rolebindings", json=binding), 201)


async def test_apply_needs_the_right_to_create_what_is_not_there(
    client: httpx.AsyncClient, robot: httpx.AsyncClient, ns: str, grant: Grant
) -> None:
    await grant([{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["patch"]}])
    path = f"/api/v1/namespaces/{ns}/configmaps/c"
    refused(await apply(robot, path, config_map()), 403, "Forbidden")
    ok(await client.post(path.rpartition("/")[0], json=config_map()), 201)
    ok(await apply(robot, path, config_map()))
