"""What a process in a pod of the fake node finds around it, and the order in which a pod's containers come and go.

Not covered: the rules behind it, case by case (test_container_rules.py). As another user than root, or
on another system than Linux, the node cannot make these surroundings: most of this is covered there in part only.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.kube.bed import NAMESPACE, Bed, bed, exiting, reasons, standin
from tests.kube.kubelet import Isolation
from tests.kube.kubelet.api import DEPLOYMENTS, PODS, SERVICE_ACCOUNTS
from tests.processes import eventually, runs

pytestmark = pytest.mark.process

SHOWN = """
import getpass, json, os, pathlib, pwd, signal

def tried(what):
    try:
        return what()
    except (OSError, KeyError) as error:
        return type(error).__name__

token = pathlib.Path("/var/run/secrets/kubernetes.io/serviceaccount")
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "uid": os.getuid(), "groups": os.getgroups(),
    "name": tried(lambda: pwd.getpwuid(os.getuid()).pw_name), "getpass": tried(getpass.getuser),
    "token": tried(lambda: sorted(each.name for each in token.iterdir())),
    "namespace": tried(lambda: (token / "namespace").read_text()),
    "writable": [each for each in ("/var/tmp", "/run", "/tmp", "/dev/shm") if os.access(each, os.W_OK)],
    "no_new_privs": status["NoNewPrivs"].strip(), "capabilities": int(status["CapEff"], 16) & ~4,
    "env": dict(os.environ),
}), flush=True)
signal.pause()
"""
"""What it finds. Capability 2 lets it read the repository where that is out of its user's reach."""
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
}


async def shown(it: Bed, name: str, container: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """What a pod with this container prints."""
    spec = {"enableServiceLinks": False, "containers": [exiting(SHOWN, **container)], **spec}
    it.api.create(PODS, {"metadata": {"namespace": NAMESPACE, "name": name}, "spec": spec})

    def printed() -> list[str]:
        return [each.log.read_text() for each in it.node.pods() if each.name == name and each.log.is_file()]

    await eventually(lambda: any(text.endswith("\n") for text in printed()), "the container prints what it finds")
    found: dict[str, Any] = json.loads(printed()[0])
    return found


async def test_a_restricted_container_is_its_images_user_on_a_read_only_root(tmp_path, monkeypatch):
    for name in ("KUBECONFIG", "WORKER_PORT"):
        monkeypatch.setenv(name, "of the test")
    async with bed(tmp_path) as it:
        volumes = [{"name": "tmp", "emptyDir": {}}]
        mounts = [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108
        container = {"image": "kvcluster:1", "securityContext": RESTRICTED, "volumeMounts": mounts}
        found = await shown(it, "p", container, volumes=volumes)
        assert found["env"]["PYTHONSAFEPATH"] == "1"
        assert found["env"]["WORKER_HOST"] == it.node.pods()[0].ip
        assert "of the test" not in found["env"].values()
        if it.node.isolation is Isolation.NONE:
            return  # this user, on this file system: the node says so
        assert (found["uid"], found["groups"], found["name"]) == (65532, [0], "KeyError")
        assert found["getpass"] == "KeyError", "what kopf asks for unless it is given an identity"
        assert found["writable"] == ["/tmp", "/dev/shm"]  # noqa: S108
        assert (found["no_new_privs"], found["capabilities"]) == ("1", 0)
        assert found["token"] == ["ca.crt", "namespace", "token"]
        assert found["namespace"] == NAMESPACE


@pytest.mark.parametrize(
    ("in_pod", "in_account", "mounted"), [(None, False, False), (True, False, True), (None, None, True)]
)
async def test_a_token_is_there_when_the_pod_or_else_its_account_says_so(tmp_path, in_pod, in_account, mounted):
    said = "automountServiceAccountToken"
    async with bed(tmp_path) as it:
        account = {"metadata": {"namespace": NAMESPACE, "name": "rag"}}
        it.api.create(SERVICE_ACCOUNTS, account if in_account is None else {**account, said: in_account})
        spec = {"serviceAccountName": "rag", **({} if in_pod is None else {said: in_pod})}
        found = await shown(it, "p", {}, **spec)
        if it.node.isolation is Isolation.FULL:
            assert (found["token"] == ["ca.crt", "namespace", "token"]) is mounted
            assert "KUBECONFIG" not in found["env"]
            assert {"KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"} <= found["env"].keys()
        else:
            assert ("KUBECONFIG" in found["env"]) is mounted


async def test_a_pod_of_an_account_that_is_none_is_not_made(tmp_path):
    async with bed(tmp_path) as it:
        await it.deploy(standin(), replicas=1, pod={"serviceAccountName": "gone"})

        def failed(items: list[Any]) -> bool:
            return any("ReplicaFailure" in str(each.get("status")) for each in items)

        (item,) = await it.until(DEPLOYMENTS, failed)
        assert reasons(item)["ReplicaFailure"] == ("True", "FailedCreate")
        assert not await it.all(PODS)


async def test_what_is_not_played_fails_the_test(tmp_path):
    async def ask_for_the_hosts_network() -> None:
        async with bed(tmp_path) as it:
            spec = {"enableServiceLinks": False, "hostNetwork": True, "containers": [standin()]}
            it.api.create(PODS, {"metadata": {"namespace": NAMESPACE, "name": "p"}, "spec": spec})
            await eventually(lambda: it.node.crashed)

    with pytest.raises(NotImplementedError, match=r"does not play spec\.hostNetwork"):
        await ask_for_the_hosts_network()


async def test_sidecars_come_first_and_stay_to_the_last(tmp_path):
    async with bed(tmp_path) as it:
        log = tmp_path / "order"
        note = f"open({str(log)!r}, 'a').write"
        on_sigterm = f"lambda *_: ({note}('sidecar ended\\n'), sys.exit())"
        code = f"import signal, sys; signal.signal(signal.SIGTERM, {on_sigterm}); {note}('sidecar\\n'); signal.pause()"
        sidecar = exiting(code, name="sidecar", restartPolicy="Always")
        last = {"preStop": {"exec": {"command": ["python", "-c", f"{note}('main ends\\n')"]}}}
        await it.deploy(standin(lifecycle=last), replicas=1, pod={"initContainers": [sidecar]})
        await it.rolled_out()
        (item,) = await it.all(PODS)
        states = {each["name"]: each for each in item["status"]["initContainerStatuses"]}
        assert states["sidecar"]["started"]
        assert states["sidecar"]["ready"]
        # The sidecar's own process writes when it gets to it.
        await eventually(lambda: log.is_file() and log.read_text().splitlines() == ["sidecar"])
        (pod,) = it.node.pods()
        await it.change(replicas=0)
        await eventually(lambda: not it.node.pods())
        assert log.read_text().splitlines()[1:] == ["main ends", "sidecar ended"]
        assert not any(runs(pid) for pid in pod.pids.values())
