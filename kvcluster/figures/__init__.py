"""What `kvcluster metrics` prints: figures computed from the metrics that routers and engines expose."""
