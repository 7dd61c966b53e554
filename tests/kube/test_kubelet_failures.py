"""The fake node when containers, images, quotas, the API server or the test itself fail.

Not covered: a node that is lost, evictions for want of memory or disk, which are not played.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import pytest

from tests.kube.bed import NAMESPACE, bed, exiting, reasons, standin, waiting
from tests.kube.kubelet import Timing
from tests.kube.kubelet.api import CONFIG_MAPS, DEPLOYMENTS, PODS
from tests.processes import eventually, runs

pytestmark = pytest.mark.process


async def test_a_killed_process_starts_again_in_place(tmp_path):
    async with bed(tmp_path) as it:
        await it.deploy(standin(), replicas=1)
        await it.rolled_out()
        (before,) = it.node.pods()
        it.node.kill(before.name, signal.SIGKILL)
        (item,) = await it.until(PODS, lambda items: items[0]["status"]["containerStatuses"][0]["restartCount"] == 1)
        assert item["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"] == 137
        await it.rolled_out()
        (after,) = it.node.pods()
        assert (after.name, after.ip, after.restarts) == (before.name, before.ip, 1)
        assert after.pid != before.pid


async def test_a_container_that_ends_again_and_again_is_backed_off(tmp_path):
    async with bed(tmp_path) as it:
        await it.deploy(exiting("import sys; print('no luck'); sys.exit(3)"), replicas=1)
        (item,) = await it.until(PODS, lambda items: [waiting(each) for each in items] == ["CrashLoopBackOff"])
        (status,) = item["status"]["containerStatuses"]
        assert status["lastState"]["terminated"]["exitCode"] == 3
        assert "restarting failed container=main" in status["state"]["waiting"]["message"]
        assert item["status"]["phase"] == "Running"
        assert "no luck" in it.node.pods()[0].log.read_text()


async def test_an_image_that_cannot_be_pulled(tmp_path):
    async with bed(tmp_path) as it:
        it.node.refuse_image("standin:1")
        await it.deploy(standin(), replicas=1)
        (item,) = await it.until(PODS, lambda items: [waiting(each) for each in items] == ["ImagePullBackOff"])
        assert item["status"]["phase"] == "Pending"
        assert "standin:1: not found" in item["status"]["containerStatuses"][0]["state"]["waiting"]["message"]
        assert it.node.pods()[0].pid is None


async def test_a_rollout_that_cannot_end_says_so_and_can_be_taken_back(tmp_path):
    async with bed(tmp_path) as it:
        it.node.refuse_image("standin:2")
        await it.deploy(standin(), progressDeadlineSeconds=20)
        await it.rolled_out()
        before = {pod.name for pod in it.node.pods()}
        await it.change(template={"spec": {"containers": [standin(image="standin:2")]}})

        def overdue(items: list[Any]) -> bool:
            return reasons(items[0])["Progressing"] == ("False", "ProgressDeadlineExceeded")

        (deployment,) = await it.until(DEPLOYMENTS, overdue)
        assert reasons(deployment)["Available"] == ("True", "MinimumReplicasAvailable")
        assert deployment["status"]["unavailableReplicas"] == 1
        await it.change(template={"spec": {"containers": [standin()]}})
        assert reasons(await it.rolled_out())["Progressing"] == ("True", "NewReplicaSetAvailable")
        await eventually(lambda: {pod.name for pod in it.node.pods()} == before)


async def test_a_command_that_does_not_exist(tmp_path):
    async with bed(tmp_path) as it:
        await it.deploy(exiting("", command=["no-such-engine", "serve"]), replicas=1)
        (item,) = await it.until(PODS, lambda items: [waiting(each) for each in items] == ["CrashLoopBackOff"])
        assert item["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"] == 127
        assert "no-such-engine: No such file or directory" in it.node.pods()[0].log.read_text()


async def test_a_quota_that_refuses_pods(tmp_path):
    async with bed(tmp_path) as it:
        it.node.quota(NAMESPACE, pods=1)
        await it.deploy(standin())

        def failed(items: list[Any]) -> bool:
            return any("ReplicaFailure" in reasons(each) for each in items if "conditions" in each.get("status", {}))

        (deployment,) = await it.until(DEPLOYMENTS, failed)
        assert reasons(deployment)["ReplicaFailure"] == ("True", "FailedCreate")
        message = deployment["status"]["conditions"][-1]["message"]
        assert "is forbidden: exceeded quota: pods, requested: pods=1, used: pods=1, limited: pods=1" in message
        it.node.quota(NAMESPACE, pods=None)
        assert "ReplicaFailure" not in reasons(await it.rolled_out())


async def test_a_container_waits_for_its_configuration(tmp_path):
    async with bed(tmp_path) as it:
        source = [{"configMapRef": {"name": "app"}}]
        await it.deploy(standin(envFrom=source), replicas=1)
        (item,) = await it.until(PODS, lambda items: [waiting(e) for e in items] == ["CreateContainerConfigError"])
        message = item["status"]["containerStatuses"][0]["state"]["waiting"]["message"]
        assert message == 'configmap "app" not found'
        named = {"metadata": {"namespace": NAMESPACE, "name": "app"}, "data": {"WHO_AM_I": "me"}}
        it.api.create(CONFIG_MAPS, named)
        await it.rolled_out()
        assert await it.get(f"http://{it.node.pods()[0].ip}:8080") == "me"


async def test_a_deaf_process_is_killed_after_its_grace_period(tmp_path):
    async with bed(tmp_path) as it:
        deaf = standin(env=[{"name": "DEAF", "value": "1"}])
        await it.deploy(deaf, replicas=1, pod={"terminationGracePeriodSeconds": 1})
        await it.rolled_out()
        (pod,) = it.node.pods()
        await it.change(replicas=0)
        await eventually(lambda: not it.node.pods())
        assert not runs(pod.pid)
        await it.until(PODS, lambda items: not items)


async def test_probes_that_can_end_a_container_do(tmp_path):
    async with bed(tmp_path, Timing(scale=0.02, deadly=0.02)) as it:
        dead = {"httpGet": {"path": "/", "port": 1}, "periodSeconds": 1, "failureThreshold": 2}
        await it.deploy(standin(livenessProbe=dead), standin(name="late", env=[], startupProbe=dead), replicas=1)

        def restarted(items: list[Any]) -> bool:
            statuses = [each for item in items for each in item["status"].get("containerStatuses", ())]
            return len(statuses) == 2 and all(each["restartCount"] for each in statuses)

        await it.until(PODS, restarted)


NODE = f"""
import asyncio, json, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.kube.bed import bed, standin
from tests.processes import eventually

async def main():
    async with bed(Path(sys.argv[1])) as it:
        await it.deploy(standin(), standin(name="module", command=["python", "-m", "http.server", "0"]), replicas=1)
        await eventually(lambda: it.node.pods() and len(it.node.pods()[0].pids) == 2, "both processes run")
        print(json.dumps(list(it.node.pods()[0].pids.values())), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_processes_die_with_a_killed_test(tmp_path):
    test = await asyncio.create_subprocess_exec(sys.executable, "-c", NODE, str(tmp_path), stdout=PIPE)
    assert test.stdout is not None
    pids = json.loads(await test.stdout.readline())
    assert all(runs(pid) for pid in pids)
    os.kill(test.pid, signal.SIGKILL)
    await test.wait()
    await eventually(lambda: not any(runs(pid) for pid in pids))
