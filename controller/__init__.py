"""From a KVCluster manifest to running processes or Kubernetes objects."""
