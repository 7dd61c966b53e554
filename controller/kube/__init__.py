"""The controller's way to the Kubernetes API server."""
