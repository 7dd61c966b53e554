"""One page about a KVCluster in a Kubernetes cluster: gathered through the API server alone, put together, shown."""
