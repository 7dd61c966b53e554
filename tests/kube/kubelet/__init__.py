"""A fake node: the parts of a cluster that turn Deployments and Services into processes that answer.

    async with FakeNode(api_url, logs=folder) as node: ...

It speaks plain HTTP to any Kubernetes API server. Not played: init containers, volumes, resources, scheduling rules,
image entrypoints (a container needs a `command`), cluster DNS, garbage collection (the API server's). A
port that something on this machine holds on 0.0.0.0 is taken for every pod.
"""

from tests.kube.kubelet.machine import Timing
from tests.kube.kubelet.node import FakeNode, PodInfo

__all__ = ["FakeNode", "PodInfo", "Timing"]
