"""The `kvcluster` command.

What a command needs is imported when it runs, so that `kvcluster --help` answers at once.
"""

from kvcluster.cli import cluster, laboratory, simulator
from kvcluster.cli.apps import app, plugin

__all__ = ["app", "cluster", "laboratory", "plugin", "simulator"]
