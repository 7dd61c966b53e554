"""`python -m kvcluster`."""

from kvcluster.cli import app

app()
