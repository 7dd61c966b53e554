"""The way to a Kubernetes API server: credentials, requests, list-watch. For router, controller and the command.

`credentials` and `client` import the official client, which takes 14 MB and 0.15 s: a process imports them only when it
talks to a cluster. The other modules do without it.
"""
