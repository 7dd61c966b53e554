"""What every process of KVCluster runs on: settings, logs, HTTP serving, draining. Imports no room."""
