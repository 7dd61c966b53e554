"""Local mode: the processes of a KVCluster on this machine, without Kubernetes."""
