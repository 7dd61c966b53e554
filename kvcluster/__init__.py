"""The `kvcluster` command: the one place that may import every room."""
