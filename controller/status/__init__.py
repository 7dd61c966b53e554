"""From what is observed in a cluster to the status of a KVCluster: pure functions, time comes in as an argument."""
