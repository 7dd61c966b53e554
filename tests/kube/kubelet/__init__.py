"""A fake node: the parts of a cluster that turn Deployments and Services into processes that answer.

    async with FakeNode(api_url, logs=folder, tokens=server_token) as node: ...

It speaks plain HTTP to the fake API server, and plays the Deployment, ReplicaSet and EndpointSlice controllers, the
ServiceAccount and quota admission, the scheduler of a cluster with one node, the kubelet and the Service proxy. Where
the tests run as root on Linux (`node.isolation` is `FULL`), a container's process has

- the uid and groups that its security context or its image asks for, without an entry in /etc/passwd; no more
  privileges where `allowPrivilegeEscalation: false` says so, no capability where ALL are dropped;
- a mount namespace: emptyDir volumes where the container mounts them, a root that is read-only where that is asked for,
  a /run and a /dev/shm of its own;
- token, namespace and CA certificate in /var/run/secrets/kubernetes.io/serviceaccount, if and only if the pod's
  `automountServiceAccountToken`, or else its account's, lets it; the API server is at KUBERNETES_SERVICE_HOST, by TLS.

Elsewhere (`NONE`) processes are this user's and share its file system; the token comes by KUBECONFIG, by the same rule.
What a process finds was compared with what the same pods find under Kubernetes 1.36 and containerd 1.6.

Not played, each module says more (docs/decisions/020-the-test-bed-models-what-tests-ask-for.md has it all):

- the network: containers share this machine's. Each pod has an address in 127.0.0.0/8, and the hosts that our processes
  listen on are set to it (`environment.addresses`); 127.0.0.1 in their settings means it too. A port that something on
  this machine holds on 0.0.0.0 is taken for every pod. There are no NetworkPolicies and no DNS;
- images: a container's files are this machine's, `python` is the interpreter of the tests, a container needs a
  `command`. Where that interpreter or the repository lies out of the user's reach, the process may read all files (and
  write none more). A volume can only be mounted where this machine has a folder (or below /run);
- resources, seccomp and scheduling rules, which are passed over; garbage collection, which is the API server's.

A pod with any field beyond those that `pod.py` names is refused: the node crashes, and the test with it.
"""

from tests.kube.kubelet.images import Image
from tests.kube.kubelet.machine import Timing
from tests.kube.kubelet.node import FakeNode, PodInfo
from tests.kube.kubelet.process import Isolation

__all__ = ["FakeNode", "Image", "Isolation", "PodInfo", "Timing"]
