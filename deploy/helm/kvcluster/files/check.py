"""What `helm test` runs: the API server serves KVClusters, and the controller is alive.

usage: check.py API CONTROLLER FOLDER     (base URLs; a folder with the files token and ca.crt)
"""

import json
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

TRIES = 10
PAUSE = 3
"""Seconds between two tries, for a controller that is still starting."""


def get(url: str, token: str = "", ca: Path | None = None) -> bytes:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    context = ssl.create_default_context(cafile=str(ca)) if ca is not None and ca.exists() else None
    request = urllib.request.Request(url, headers=headers)  # noqa: S310  the chart gives the URLs
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(request, timeout=5, context=context) as answer:  # noqa: S310
                body: bytes = answer.read()
                return body
        except OSError as error:
            if attempt == TRIES - 1 or isinstance(error, urllib.error.HTTPError):
                sys.exit(f"{url}: {error}")
        time.sleep(PAUSE)
    raise AssertionError


def main(api: str, controller: str, folder: Path) -> None:
    token, ca = (folder / "token").read_text(), folder / "ca.crt"
    listed = json.loads(get(f"{api}/apis/kvcluster.dev/v1alpha1", token, ca))
    if "kvclusters" not in [resource["name"] for resource in listed["resources"]]:
        sys.exit("the API server has kvcluster.dev/v1alpha1, but no kvclusters in it: is the CRD of this release?")
    sys.stdout.write("the API server serves kvclusters.kvcluster.dev/v1alpha1\n")
    get(f"{controller}/healthz")
    sys.stdout.write("the controller is alive\n")


main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
