"""From what was observed to the status of a KVCluster: pure functions that get the time as an argument."""
