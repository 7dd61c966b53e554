"""The KVCluster manifest: its model, how it is read and refused, and the table that documents it."""
