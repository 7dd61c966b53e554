"""The vocabulary that every room of KVCluster shares; it imports none of them."""
