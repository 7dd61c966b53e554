"""The chart, rendered by helm 3 and helm 4.

Not covered: an API server that takes these objects (test_install.py), and what runs from them (tests/kube/e2e).
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from controller.objects.names import ENVOY_IMAGE
from controller.settings import Settings
from deploy.helm.docs import CHART, DOCUMENT, ROOT, SCHEMA, VALUES, defaults, schema, values, values_yaml, with_table
from deploy.monitoring.alerts import ALERTS, rule_groups
from tests.deploy.conftest import NAMESPACE, RELEASE, Helm, find_helm

helm_runs = pytest.mark.process

WITHOUT_SCHEMA = {"PodMonitor", "ServiceMonitor", "PrometheusRule"}
"""Kinds of the Prometheus operator, of which kubernetes-validate knows nothing."""
VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))["appVersion"]
CLUSTER_SCOPED = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}


def named(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [item for item in objects if item["kind"] == kind]


def only(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    [item] = named(objects, kind)
    return item


def pod_specs(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of Deployments, and of the pods that tests run."""
    deployments = [item["spec"]["template"]["spec"] for item in named(objects, "Deployment")]
    return deployments + [item["spec"] for item in named(objects, "Pod")]


def controller(objects: list[dict[str, Any]]) -> dict[str, Any]:
    [container] = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(container)


def environment(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return {variable["name"]: variable.get("value") for variable in controller(objects)["env"]}


# --- what holds for every set of values -------------------------------------------------------------------


@helm_runs
def test_lint(helm: Helm, ci_values: Path) -> None:
    helm.ok("lint", "--strict", CHART, "--values", ci_values)


@helm_runs
def test_helm_3_and_helm_4_render_the_same(helm_4: Helm, ci_values: Path, tmp_path: Path) -> None:
    """What the other tests of this module see of helm 4's objects is then true of helm 3's."""
    helm_3 = find_helm(3, tmp_path / "helm-3")
    assert helm_3.template("--values", ci_values) == helm_4.template("--values", ci_values)


@helm_runs
def test_every_object_is_what_kubernetes_accepts(helm_4: Helm, ci_values: Path) -> None:
    objects = helm_4.template("--values", ci_values)
    assert len(
        {(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects}
    ) == len(objects)
    for item in objects:
        if item["kind"] in WITHOUT_SCHEMA:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            kubernetes_validate.validate(item, "1.32", strict=True)


@helm_runs
def test_every_pod_is_restricted(helm_4: Helm, ci_values: Path) -> None:
    specs = pod_specs(helm_4.template("--values", ci_values))
    assert len(specs) == 2
    for spec in specs:
        assert spec["enableServiceLinks"] is False
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert context.get("runAsUser", 1) > 0
        assert context.get("runAsUser") == context.get("runAsGroup")
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
            assert not container["image"].endswith(":latest")
        assert all("hostPath" not in volume for volume in spec.get("volumes", ()))


@helm_runs
def test_every_object_carries_the_labels(helm_4: Helm, ci_values: Path) -> None:
    for item in helm_4.template("--values", ci_values):
        labels = item["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "kvcluster", item["kind"]
        assert labels["app.kubernetes.io/instance"] == RELEASE
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        if item["kind"] not in CLUSTER_SCOPED | {"Role", "RoleBinding", "ConfigMap", "PrometheusRule"}:
            assert item["metadata"]["namespace"] == NAMESPACE


# --- what single values do --------------------------------------------------------------------------------


@helm_runs
def test_one_controller_never_two(helm_4: Helm) -> None:
    spec = only(helm_4.template(), "Deployment")["spec"]
    assert spec["replicas"] == 1
    assert spec["strategy"] == {"type": "Recreate"}
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert labels["app.kubernetes.io/component"] == "controller"


@helm_runs
def test_the_process_gets_what_the_contract_says(helm_4: Helm) -> None:
    objects = helm_4.template()
    container = controller(objects)
    assert container["command"] == ["python", "-m", "controller.main"]
    assert environment(objects) == {
        "CONTROLLER_IMAGE": f"kvcluster:{VERSION}",
        "CONTROLLER_IMAGE_PULL_POLICY": "IfNotPresent",
        "CONTROLLER_ENVOY_IMAGE": ENVOY_IMAGE,
        "CONTROLLER_ENVOY_IMAGE_PULL_POLICY": "IfNotPresent",
        "CONTROLLER_WATCH_NAMESPACES": "",
        "CONTROLLER_NAMESPACE": None,
        "CONTROLLER_LOG_LEVEL": "info",
        "CONTROLLER_LOG_FORMAT": "kv",
        "CONTROLLER_HEALTH_PORT": "8081",
        "CONTROLLER_METRICS_PORT": "8080",
    }
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"metrics": 8080, "health": 8081}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": "health"}
    assert container["startupProbe"]["initialDelaySeconds"] > 0, "a failed probe of a normal start is a Warning"
    assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]  # noqa: S108


@helm_runs
@pytest.mark.parametrize(
    ("settings", "image"),
    [
        ([], f"kvcluster:{VERSION}"),
        (["image.repository=reg.example.com:5000/a/b", "image.tag=1.2.3"], "reg.example.com:5000/a/b:1.2.3"),
        (["image.tag=1.2.3", f"image.digest=sha256:{'a' * 64}"], f"kvcluster@sha256:{'a' * 64}"),
    ],
)
def test_one_image_for_the_controller_and_what_it_starts(helm_4: Helm, settings: list[str], image: str) -> None:
    objects = helm_4.template(*(f"--set={setting}" for setting in settings))
    assert environment(objects)["CONTROLLER_IMAGE"] == image
    assert {container["image"] for spec in pod_specs(objects) for container in spec["containers"]} == {image}


@helm_runs
@pytest.mark.parametrize(
    ("settings", "image"),
    [
        (["repository=reg.example.com:5000/envoy", "tag=v1.40.1"], "reg.example.com:5000/envoy:v1.40.1"),
        (["pullPolicy=Never", f"digest=sha256:{'b' * 64}"], f"envoyproxy/envoy@sha256:{'b' * 64}"),
    ],
)
def test_the_image_of_envoys_reaches_the_controller(helm_4: Helm, settings: list[str], image: str) -> None:
    found = environment(helm_4.template(*(f"--set=envoy.image.{setting}" for setting in settings)))
    given = [f"--envoy-image={found['CONTROLLER_ENVOY_IMAGE']}", "--image=i"]
    given.append(f"--envoy-image-pull-policy={found['CONTROLLER_ENVOY_IMAGE_PULL_POLICY']}")
    release = Settings.load(given).release
    assert release.envoy_image == image
    assert release.envoy_image_pull_policy == ("Never" if "pullPolicy=Never" in settings else "IfNotPresent")


@helm_runs
def test_secrets_to_pull_images_reach_what_the_controller_starts(helm_4: Helm) -> None:
    objects = helm_4.template("--set=imagePullSecrets[0].name=a", "--set=imagePullSecrets[1].name=b")
    assert environment(objects)["CONTROLLER_IMAGE_PULL_SECRETS"] == "a,b"
    for spec in pod_specs(objects):
        assert [each["name"] for each in spec["imagePullSecrets"]] == ["a", "b"]
    settings = Settings.load(["--image=i", "--image-pull-secrets=a,b"])
    assert settings.release.image_pull_secrets == ("a", "b")
    assert "CONTROLLER_IMAGE_PULL_SECRETS" not in environment(helm_4.template())


@helm_runs
def test_the_service_has_the_families_that_are_asked_for(helm_4: Helm) -> None:
    families = ["IPv6", "IPv4"]
    objects = helm_4.template("--set=service.ipFamilyPolicy=PreferDualStack", "--set=service.ipFamilies={IPv6,IPv4}")
    spec = only(objects, "Service")["spec"]
    assert (spec["ipFamilyPolicy"], spec["ipFamilies"]) == ("PreferDualStack", families)
    assert not {"ipFamilyPolicy", "ipFamilies"} & only(helm_4.template(), "Service")["spec"].keys()


@helm_runs
def test_all_namespaces_by_default(helm_4: Helm) -> None:
    objects = helm_4.template()
    assert not named(objects, "Role")
    binding = only(objects, "ClusterRoleBinding")
    account = only(objects, "ServiceAccount")["metadata"]
    [subject] = binding["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": account["name"], "namespace": NAMESPACE}
    assert binding["roleRef"]["name"] in {role["metadata"]["name"] for role in named(objects, "ClusterRole")}
    spec = only(objects, "Deployment")["spec"]["template"]["spec"]
    assert spec["serviceAccountName"] == account["name"]


@helm_runs
def test_a_list_of_namespaces_needs_nothing_cluster_wide(helm_4: Helm) -> None:
    objects = helm_4.template("--values", CHART / "ci" / "namespaced-values.yaml")
    assert not [item["kind"] for item in objects if item["kind"] in CLUSTER_SCOPED]
    for kind in ("Role", "RoleBinding"):
        assert [item["metadata"]["namespace"] for item in named(objects, kind)] == ["team-a", "team-b"]
    assert environment(objects)["CONTROLLER_WATCH_NAMESPACES"] == "team-a,team-b"
    rules = only(helm_4.template("--set=rbac.aggregate=false"), "ClusterRole")["rules"]
    for role in named(objects, "Role"):
        assert role["rules"] == [rule for rule in rules if "customresourcedefinitions" not in rule["resources"]]


@helm_runs
def test_no_permission_is_wider_than_needed(helm_4: Helm) -> None:
    role = only(helm_4.template("--set=rbac.aggregate=false"), "ClusterRole")
    resources = {resource for rule in role["rules"] for resource in rule["resources"]}
    verbs = {verb for rule in role["rules"] for verb in rule["verbs"]}
    groups = {group for rule in role["rules"] for group in rule["apiGroups"]}
    assert "*" not in resources | verbs | groups
    assert not {"nodes", "pods/exec", "clusterroles", "clusterrolebindings"} & resources
    (secrets,) = [rule for rule in role["rules"] if "secrets" in rule["resources"]]
    assert secrets == {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get", "create"]}
    assert not {"escalate", "bind", "impersonate", "deletecollection"} & verbs


@helm_runs
def test_with_a_secret_of_ones_own_the_controller_has_no_right_on_secrets(helm_4: Helm) -> None:
    own = CHART / "ci" / "own-token-values.yaml"
    role = only(helm_4.template("--set=rbac.aggregate=false", f"--values={own}"), "ClusterRole")
    assert not any("secrets" in rule["resources"] for rule in role["rules"])
    default = only(helm_4.template("--set=rbac.aggregate=false"), "ClusterRole")
    assert [rule for rule in default["rules"] if "secrets" not in rule["resources"]] == role["rules"]
    pod = only(helm_4.template(f"--values={own}"), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {each["name"]: each.get("value") for each in container["env"]}
    assert env["CONTROLLER_MANAGEMENT_SECRET"] == "kvcluster-management"
    (volume,) = [each for each in pod["volumes"] if "secret" in each]
    assert volume["secret"] == {"secretName": "kvcluster-management"}
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == volume["name"]]
    assert mount["mountPath"] == env["CONTROLLER_MANAGEMENT_TOKEN_FILE"]
    settings = Settings.load(["--image=i", "--management-secret=kvcluster-management"])
    assert settings.release.management_secret == "kvcluster-management"


@helm_runs
def test_users_roles_include_kvclusters(helm_4: Helm) -> None:
    roles = named(helm_4.template(), "ClusterRole")
    aggregated = {
        label.rpartition("-")[2]: role["rules"]
        for role in roles
        for label in role["metadata"]["labels"]
        if label.startswith("rbac.authorization.k8s.io/aggregate-to-")
    }
    assert set(aggregated) == {"view", "edit", "admin"}
    assert {verb for rule in aggregated["view"] for verb in rule["verbs"]} == {"get", "list", "watch"}
    assert not any("kvclusters/status" in rule["resources"] for rule in aggregated["edit"])


@helm_runs
def test_the_crd_is_the_file_and_is_kept(helm_4: Helm) -> None:
    rendered = only(helm_4.template(), "CustomResourceDefinition")
    written = yaml.safe_load((CHART / "files" / "crd.yaml").read_text(encoding="utf-8"))
    assert not {"annotations", "labels"} & set(written["metadata"]), "the template adds these by text"
    assert rendered["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert rendered["metadata"].pop("labels")
    assert rendered == written
    assert not named(helm_4.template("--set=crds.install=false"), "CustomResourceDefinition")


@helm_runs
def test_monitors(helm_4: Helm) -> None:
    assert not [item for item in helm_4.template() if item["kind"] in WITHOUT_SCHEMA]
    for kind, endpoints in (("PodMonitor", "podMetricsEndpoints"), ("ServiceMonitor", "endpoints")):
        monitor = only(helm_4.template(f"--set=metrics.monitor.kind={kind},metrics.monitor.labels.team=x"), kind)
        assert monitor["metadata"]["labels"]["team"] == "x"
        [endpoint] = monitor["spec"][endpoints]
        assert endpoint["port"] == "metrics"


@helm_runs
def test_dashboards(helm_4: Helm) -> None:
    assert not named(helm_4.template(), "ConfigMap")
    found = named(
        helm_4.template(
            "--set=dashboards.enabled=true,dashboards.label=boards,dashboards.labelValue=yes,dashboards.namespace=grafana",
            "--set=dashboards.annotations.grafana_folder=KV",
        ),
        "ConfigMap",
    )
    written = {}
    for item in found:
        assert item["metadata"]["namespace"] == "grafana"
        assert item["metadata"]["labels"]["boards"] == "yes"
        assert item["metadata"]["annotations"] == {"grafana_folder": "KV"}
        written |= {name: json.loads(text) for name, text in item["data"].items()}
    assert written == {
        f"kvcluster-{file.name}": json.loads(file.read_text(encoding="utf-8"))
        for file in (CHART / "dashboards").glob("*.json")
    }


RULE_FIELDS = {
    "alert": {"alert", "expr", "for", "labels", "annotations", "keep_firing_for"},
    "record": {"record", "expr", "labels"},
}
"""What the CRD monitoring.coreos.com/v1 PrometheusRule allows in a rule; `expr` and one of the names are required."""


@helm_runs
def test_alerts_are_the_file_as_a_prometheus_rule(helm_4: Helm) -> None:
    switches = "metrics.scrapeAnnotations=true,alerts.enabled=true"
    found = only(helm_4.template(f"--set={switches},alerts.labels.release=prometheus"), "PrometheusRule")
    assert (found["apiVersion"], found["metadata"]["namespace"]) == ("monitoring.coreos.com/v1", NAMESPACE)
    assert found["metadata"]["labels"]["release"] == "prometheus"
    assert found["spec"] == {"groups": rule_groups()}
    for group in found["spec"]["groups"]:
        assert group.keys() == {"name", "rules"}
        for rule in group["rules"]:
            assert rule.keys() <= RULE_FIELDS["alert" if "alert" in rule else "record"]
            texts = [rule["expr"], *rule.get("labels", {}).values(), *rule.get("annotations", {}).values()]
            assert all(isinstance(text, str) and text for text in texts)
            assert re.fullmatch(r"(\d+m)?", rule.get("for", ""))
    assert not named(helm_4.template("--set=metrics.scrapeAnnotations=true"), "PrometheusRule"), "behind a switch"


@helm_runs
def test_alerts_can_be_left_out_labelled_and_led_to_the_runbooks(helm_4: Helm) -> None:
    found = only(helm_4.template("--values", CHART / "ci" / "everything-values.yaml"), "PrometheusRule")
    assert found["metadata"]["namespace"] == "monitoring"
    rules = {rule["alert"]: rule for group in found["spec"]["groups"] for rule in group["rules"] if "alert" in rule}
    assert rules.keys() == set(ALERTS) - {"KVClusterLoadSkewed"}
    for name, rule in rules.items():
        assert rule["labels"]["team"] == "serving"
        assert rule["annotations"]["runbook_url"] == f"https://docs.example.com/runbooks/{name}/"
    boards = named(helm_4.template("--values", CHART / "ci" / "everything-values.yaml"), "ConfigMap")
    text = "".join(text for item in boards for text in item["data"].values())
    assert "runbooks.example.com" not in text
    assert set(re.findall(r"https://docs\.example\.com/runbooks/(\w+)/", text)) == {*ALERTS, "README"}
    assert "https://docs.example.com/runbooks/${__value.text}/" in text


@helm_runs
def test_alerts_need_a_controller_that_is_scraped(helm_4: Helm) -> None:
    refused = helm_4.run("template", "x", CHART, "--set=alerts.enabled=true")
    assert refused.returncode != 0
    assert "Set metrics.monitor.kind or metrics.scrapeAnnotations" in refused.stderr
    helm_4.ok("template", "x", CHART, "--set=alerts.enabled=true", "--set=alerts.disabled={KVClusterControllerDown}")


def test_every_alert_can_be_left_out() -> None:
    assert set(schema()["properties"]["alerts"]["properties"]["disabled"]["items"]["enum"]) == set(ALERTS)


@helm_runs
@pytest.mark.parametrize("release", ["kvcluster", "r" * 53])
def test_names_fit(helm_4: Helm, release: str) -> None:
    for item in helm_4.template("--values", CHART / "ci" / "default-values.yaml", release=release):
        assert len(item["metadata"]["name"].partition(":")[2] or item["metadata"]["name"]) <= 63


@helm_runs
def test_notes_say_what_to_do_next(helm_4: Helm) -> None:
    # helm 3 shows notes only to those who have a cluster: what it shows then is looked at in test_install.
    notes = helm_4.ok(
        "install", RELEASE, CHART, "--namespace", NAMESPACE, "--dry-run=client", "--set=watchNamespaces={a}"
    )
    assert f"helm test {RELEASE} --namespace {NAMESPACE}" in notes
    assert "kubectl --namespace a apply" in notes
    found = re.search(r"<<'EOF'\n(.*?)^EOF$", notes, re.DOTALL | re.MULTILINE)
    assert found is not None
    minimal = yaml.safe_load((ROOT / "examples" / "minimal.yaml").read_text(encoding="utf-8"))
    assert yaml.safe_load(found[1]) == minimal


@helm_runs
@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("imagee.tag=1", "imagee"),
        ("image.tagg=1", "tagg"),
        ("image.tag=latest", "tag"),
        ("image.digest=abc", "digest"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("watchNamespaces=team-a", "watchNamespaces"),
        ("watchNamespaces={Team_A}", "watchNamespaces"),
        ("crds.install=maybe", "install"),
        ("logLevel=loud", "logLevel"),
        ("metrics.monitor.kind=Monitor", "kind"),
        ("runAsUser=0", "runAsUser"),
        ("imagePullSecrets[0].nam=x", "imagePullSecrets"),
        ("resources.request.cpu=1", "request"),
    ],
)
def test_bad_values_are_refused_by_name(helm: Helm, setting: str, field: str) -> None:
    ended = helm.run("template", RELEASE, CHART, "--set", setting)
    assert ended.returncode != 0
    assert field in ended.stderr, ended.stderr


# --- one source for the values ----------------------------------------------------------------------------


def test_values_yaml_and_the_table_are_those_of_the_schema() -> None:
    message = "run: python -m deploy.helm.docs"
    assert VALUES.read_text(encoding="utf-8") == values_yaml(), message
    document = DOCUMENT.read_text(encoding="utf-8")
    assert with_table(document) == document, message
    assert yaml.safe_load(values_yaml()) == defaults(schema()["properties"])


def test_every_value_is_described_and_nothing_else_is_allowed() -> None:
    def closed(node: dict[str, Any], path: str) -> None:
        if "properties" in node:
            assert node["type"] == "object"
            assert "additionalProperties" in node or path.endswith("]"), path
        for name, below in node.get("properties", {}).items():
            assert node["additionalProperties"] is False, path
            closed(below, f"{path}.{name}")
        if isinstance(node.get("items"), dict):
            closed(node["items"], f"{path}[]")

    closed(json.loads(SCHEMA.read_text(encoding="utf-8")), "")
    assert all(value.description.endswith(".") for value in values(schema()["properties"]))


def test_templates_use_every_value() -> None:
    templates = "".join(file.read_text(encoding="utf-8") for file in (CHART / "templates").rglob("*.*"))
    for value in values(schema()["properties"]):
        name = value.path.rpartition(".")[2]
        assert value.path == "global" or re.search(rf"[.\s]{name}\b", templates), value.path
