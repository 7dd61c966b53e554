"""Which Kubernetes objects a KVCluster asks for: pure functions from its spec to manifests for server-side apply."""
