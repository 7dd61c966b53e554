"""The Deployment controller and the ReplicaSet controller in one: pods of Deployments, and the status of both.

What it decides is in `rollout.py`. Checked by `test_kubelet.py` and `test_kubelet_failures.py`. Not played: the
history of revisions (ReplicaSets stay), adoption of pods, `paused`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.kube.apiserver.errors import ApiError
from tests.kube.kubelet.api import DEPLOYMENTS, PODS, REPLICA_SETS, Api, Key, Kind, Object, WorkQueue, key_of, now
from tests.kube.kubelet.environment import ConfigError
from tests.kube.kubelet.machine import Timing
from tests.kube.kubelet.rollout import (
    COUNTS,
    Counted,
    deployment_status,
    is_active,
    is_complete,
    is_ready,
    next_step,
    progressed,
    replica_set_status,
    victims,
)
from tests.kube.kubelet.volumes import account_of

HASH = "pod-template-hash"
REVISION = "deployment.kubernetes.io/revision"
GENERATED = 58
"""Characters of a generated name before its random suffix."""
ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
RETRY_CREATE = 0.5
SLACK = 0.01


@dataclass(slots=True)
class _Rollout:
    """What is remembered of a Deployment from one reconciliation to the next."""

    newest: str = ""
    created: bool = False
    progress: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)


class Deployments:
    """Reconciles Deployments by name."""

    def __init__(self, api: Api, quotas: Quotas, timing: Timing) -> None:
        self._api = api
        self._quotas = quotas
        self._timing = timing
        self._rollouts: dict[str, _Rollout] = {}
        self.queue = WorkQueue(self._reconcile)
        api.on_change(DEPLOYMENTS, self._on_deployment)
        api.on_change(REPLICA_SETS, lambda item, _: self._add_owner(item))
        api.on_change(PODS, self._on_pod)

    def everything(self) -> None:
        """Reconciles every Deployment again."""
        for item in self._api.all(DEPLOYMENTS):
            self.queue.add(key_of(item))

    def _on_deployment(self, item: Object, exists: bool) -> None:
        if not exists:
            self._rollouts.pop(item["metadata"]["uid"], None)
        self.queue.add(key_of(item))

    def _on_pod(self, item: Object, exists: bool) -> None:
        owner = _owner(item)
        replica_set = self._api.get(REPLICA_SETS, (item["metadata"]["namespace"], owner.get("name", "")))
        if owner.get("kind") == "ReplicaSet" and replica_set is not None:
            self._add_owner(replica_set)

    def _add_owner(self, item: Object) -> None:
        owner = _owner(item)
        if owner.get("kind") == "Deployment":
            self.queue.add((item["metadata"]["namespace"], owner["name"]))

    def _reconcile(self, key: Key) -> float | None:
        deployment = self._api.get(DEPLOYMENTS, key)
        if deployment is None or "deletionTimestamp" in deployment["metadata"]:
            return None
        spec, uid = deployment["spec"], deployment["metadata"]["uid"]
        if spec.get("minReadySeconds"):
            raise NotImplementedError(f"{key}: the fake node does not play minReadySeconds")
        state = self._rollouts.setdefault(uid, _Rollout())
        desired = spec.get("replicas", 1)
        owned = sorted(
            (each for each in self._api.all(REPLICA_SETS) if _owner(each).get("uid") == uid),
            key=lambda each: _revision(each),
        )
        name = f"{key[1]}-{template_hash(spec['template'])}"
        new = next((each for each in owned if each["metadata"]["name"] == name), None)
        old = [each for each in owned if each is not new]
        now_there = Counted() if new is None else self._counted(new)
        step = next_step(spec.get("strategy") or {}, desired, now_there, [self._counted(each) for each in old])
        revision = max((_revision(each) for each in old), default=0) + 1
        if state.newest != name:
            # A rollout begins; back to an earlier template it does so without a condition of its own.
            state.newest, state.progress = name, asyncio.get_running_loop().time()
        if new is None:
            new = self._create_set(deployment, name, step.new, revision)
            state.created = True
        else:
            revision = max(revision, _revision(new))
            self._scale(deployment, new, step.new, revision)
        for replica_set, size in zip(old, step.old, strict=True):
            self._scale(deployment, replica_set, size, _revision(replica_set))
        for replica_set in (new, *old):
            current = self._api.get(REPLICA_SETS, key_of(replica_set)) or replica_set
            self._sync_pods(current, state)
            self._write_set_status(current, state)
        self._write_revision(deployment, revision)
        return self._write_status(deployment, new, old, state)

    def _pods_of(self, replica_set: Object) -> list[Object]:
        uid = replica_set["metadata"]["uid"]
        return [pod for pod in self._api.all(PODS) if _owner(pod).get("uid") == uid]

    def _counted(self, replica_set: Object) -> Counted:
        replica_set = self._api.get(REPLICA_SETS, key_of(replica_set)) or replica_set
        active = [pod for pod in self._pods_of(replica_set) if is_active(pod)]
        wanted = replica_set["spec"].get("replicas", 1)
        return Counted(wanted, len(active), sum(map(is_ready, active)), replica_set["metadata"]["name"])

    def _create_set(self, deployment: Object, name: str, size: int, revision: int) -> Object:
        spec = deployment["spec"]
        marked = {HASH: name.rpartition("-")[2]}
        template = spec["template"]
        metadata = template.get("metadata") or {}
        labels = {**(metadata.get("labels") or {}), **marked}
        selector = {**spec["selector"], "matchLabels": {**(spec["selector"].get("matchLabels") or {}), **marked}}
        item = {
            "metadata": {
                "namespace": deployment["metadata"]["namespace"],
                "name": name,
                "labels": labels,
                "annotations": {REVISION: str(revision)},
                "ownerReferences": [_reference("apps/v1", "Deployment", deployment)],
            },
            "spec": {
                "replicas": size,
                "selector": selector,
                "template": {**template, "metadata": {**metadata, "labels": labels}},
            },
        }
        created = self._api.create(REPLICA_SETS, item)
        self._say_scaled(deployment, name, 0, size)
        return created

    def _scale(self, deployment: Object, replica_set: Object, size: int, revision: int) -> None:
        present = replica_set["spec"].get("replicas", 1)
        if present != size or _revision(replica_set) != revision:
            patch = {"spec": {"replicas": size}, "metadata": {"annotations": {REVISION: str(revision)}}}
            self._api.patch(REPLICA_SETS, key_of(replica_set), patch)
            self._say_scaled(deployment, replica_set["metadata"]["name"], present, size)

    def _say_scaled(self, deployment: Object, name: str, before: int, after: int) -> None:
        if before != after:
            way = "up" if after > before else "down"
            said = f"Scaled {way} replica set {name} from {before} to {after}"
            self._api.say(DEPLOYMENTS, deployment, "ScalingReplicaSet", said)

    def _sync_pods(self, replica_set: Object, state: _Rollout) -> None:
        """Creates or deletes pods until the ReplicaSet has as many as it should."""
        name = replica_set["metadata"]["name"]
        active = [pod for pod in self._pods_of(replica_set) if is_active(pod)]
        wanted = replica_set["spec"].get("replicas", 1)
        before = state.failures.pop(name, None)
        try:
            for _ in range(wanted - len(active)):
                pod = _new_pod(replica_set)
                self._admit(pod)
                self._api.create(PODS, pod)
        except ApiError as error:
            # Every attempt is about a pod of another name; as in a cluster, the first one's message stays.
            state.failures[name] = before or error.message
            if before is None:
                said = f"Error creating: {error.message}"
                self._api.say(REPLICA_SETS, replica_set, "FailedCreate", said, warning=True)
        for victim in victims(active, len(active) - wanted) if len(active) > wanted else ():
            self._api.delete(PODS, victim)

    def _admit(self, pod: Object) -> None:
        """Raises `ApiError` for what the API server's admission refuses: the quota, a service account that is none."""
        self._quotas.check(pod)
        try:
            account_of(self._api, pod)
        except ConfigError as error:
            name = pod["metadata"]["name"]
            raise ApiError(403, f'pods "{name}" is forbidden: {error}') from None

    def _write_set_status(self, replica_set: Object, state: _Rollout) -> None:
        failure = state.failures.get(replica_set["metadata"]["name"], "")
        status = replica_set_status(replica_set, self._counted(replica_set), failure, now())
        self._write(REPLICA_SETS, replica_set, status)

    def _write_revision(self, deployment: Object, revision: int) -> None:
        annotations = deployment["metadata"].get("annotations") or {}
        if annotations.get(REVISION) != str(revision):
            patch = {"metadata": {"annotations": {REVISION: str(revision)}}}
            self._api.patch(DEPLOYMENTS, key_of(deployment), patch)

    def _write_status(self, deployment: Object, new: Object, old: Sequence[Object], state: _Rollout) -> float | None:
        """Writes the Deployment's status; the seconds after which time alone will have changed it, if any."""
        spec, time = deployment["spec"], asyncio.get_running_loop().time()
        desired = spec.get("replicas", 1)
        patience = self._timing.scaled(spec.get("progressDeadlineSeconds", 600))
        overdue = time - state.progress > patience
        status = deployment_status(
            deployment,
            self._counted(new),
            [self._counted(each) for each in old],
            created=state.created,
            failure=next(iter(state.failures.values()), ""),
            overdue=overdue,
            now=now(),
        )
        complete = is_complete(status, desired)
        if complete or progressed(deployment.get("status", {}), status):
            state.progress, overdue = time, False
        self._write(DEPLOYMENTS, deployment, status)
        state.created = False
        waits = [RETRY_CREATE] if state.failures else []
        if not complete and not overdue:
            waits.append(state.progress + patience - time + SLACK)
        return min(waits, default=None)

    def _write(self, kind: Kind, item: Object, status: Object) -> None:
        present = (self._api.get(kind, key_of(item)) or item).get("status", {})
        absent = {"conditions": [], **dict.fromkeys((*COUNTS, "fullyLabeledReplicas"), 0)}
        if any(present.get(name, absent.get(name)) != value for name, value in status.items()):
            # As the API server shows it: zeros and empty lists are left out.
            shown = {name: None if value in (0, []) else value for name, value in status.items()}
            if kind is REPLICA_SETS:
                shown["replicas"] = status["replicas"]
            self._api.patch(kind, key_of(item), {"status": shown}, "status")


def template_hash(template: Mapping[str, Any]) -> str:
    """Names a pod template: equal templates have equal hashes."""
    digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).digest()
    return "".join(ALPHABET[byte % len(ALPHABET)] for byte in digest[:10])


def _new_pod(replica_set: Object) -> Object:
    template = replica_set["spec"]["template"]
    metadata, name = template.get("metadata") or {}, replica_set["metadata"]["name"]
    suffix = "".join(secrets.choice(ALPHABET) for _ in range(5))
    return {
        "metadata": {
            "namespace": replica_set["metadata"]["namespace"],
            "name": f"{name}-"[:GENERATED] + suffix,
            "generateName": f"{name}-",
            "labels": metadata.get("labels") or {},
            "annotations": metadata.get("annotations") or {},
            "ownerReferences": [_reference("apps/v1", "ReplicaSet", replica_set)],
        },
        "spec": template["spec"],
        "status": {"phase": "Pending"},
    }


def _reference(version: str, kind: str, owner: Object) -> dict[str, Any]:
    metadata = owner["metadata"]
    named = {"apiVersion": version, "kind": kind, "name": metadata["name"], "uid": metadata["uid"]}
    return {**named, "controller": True, "blockOwnerDeletion": True}


def _owner(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """The reference to the controller of an object; empty when it has none."""
    references = item["metadata"].get("ownerReferences") or ()
    found: Mapping[str, Any] = next((each for each in references if each.get("controller")), {})
    return found


def _revision(replica_set: Object) -> int:
    return int((replica_set["metadata"].get("annotations") or {}).get(REVISION, 0))


class Quotas:
    """How many pods a namespace may have."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._limits: dict[str, int] = {}

    def set(self, namespace: str, pods: int | None) -> None:
        """From now on at most this many; None: any number."""
        if pods is None:
            self._limits.pop(namespace, None)
        else:
            self._limits[namespace] = pods

    def check(self, pod: Mapping[str, Any]) -> None:
        """Raises `ApiError`, as the API server answers, when the namespace is full."""
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        limit = self._limits.get(namespace)
        if limit is None:
            return
        used = sum(each["metadata"]["namespace"] == namespace and _counts(each) for each in self._api.all(PODS))
        if used + 1 > limit:
            said = f"requested: pods=1, used: pods={used}, limited: pods={limit}"
            raise ApiError(403, f'pods "{name}" is forbidden: exceeded quota: pods, {said}')


def _counts(pod: Mapping[str, Any]) -> bool:
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")
